"""Moving one instance to another node, between two of its turns.

Always true:
- What makes it move is one epoch transaction, as in every failover. All that comes before can be given up
  and has changed nothing; all that comes after only makes the next turn quicker. So at whatever point the
  source, the target or this coordinator dies, a turn is lost or doubled no more than by any other loss.
- No turn runs on the source from its release to the outcome: turns that come meanwhile wait there, and then
  either run there (the move was given up) or are told EPOCH_STALE, and their clients find the target.
- The source serves while the target prepares, which is what takes long. The pause is what comes after.

How it can fail: the target refuses or dies (given up), the turn that runs does not end in time (given up; or
with `now` it is cut off by the transaction, and run again on the target), the source can't be asked (given
up: if it is dead, its TTL will tell), somebody else places the instance (theirs counts). If this coordinator
dies between release and transaction, the source takes turns again by itself after _GATE seconds.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

from coordinator.ownership import Ownership, Placed
from coordinator.placement import Client, NoRoom, choose
from coordinator.records import AgentRecord, InstanceRecord, NodeRecord, NodeState, Phase, Role, Stored
from coordinator.resolving import Resolving
from protos.v1 import blobs_pb2, link_pb2
from shared.errors import Reason, RoostError
from shared.identity import InstanceKey

log = logging.getLogger(__name__)

TURN = 30.0  # seconds for the turn that runs to end, if nobody says otherwise
_PREPARE = 300.0  # seconds: an agent's packages and gigabytes of state take a while
_ROUNDS = 3  # of preparation, each for what the source committed during the one before
_READY = 60.0  # seconds for the agent to start; agent.toml may allow it less
_ANSWER = 2.0  # seconds for a node to answer what takes no time
_GATE = 5.0  # seconds that the source holds turns back without hearing of the outcome
_LOOKS = 8  # at the record, each after losing to another writer
_TRIES = 4  # targets that are asked, when any will do

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Wish:
    """`target` None: the best node but the one where it is. `now`: do not wait for its turn to end. `home`:
    it shall stay there, even if that is the cloud."""

    key: InstanceKey
    target: str | None
    why: str
    home: bool = False
    turn: float = TURN
    now: bool = False


@dataclass(frozen=True, slots=True)
class Moved:
    """`pause` in seconds, from when no turn could begin on the source to when one could on the target; 0 for
    one that slept. `trouble`: it could not be started there, though it is its own now."""

    record: InstanceRecord
    source: str
    live: bool
    pause: float
    prefetched: int
    trouble: str = ""


class Askable(Protocol):
    """Nodes, wherever their links are. Real: `coordinator.reach.Reach`."""

    async def move(
        self, node: NodeRecord, step: link_pb2.MoveStep, timeout: float
    ) -> link_pb2.MoveStepReply: ...


class Inline(Protocol):
    """Real: `coordinator.inline.InlineCommits`."""

    async def of(self, key: InstanceKey) -> list[blobs_pb2.Blob]:
        """What of the instance the blob store may not have yet."""
        ...


class Moves:
    def __init__(
        self,
        ownership: Ownership,
        resolving: Resolving,
        reach: Askable,
        inline: Inline,
        hold: float,
        clock: Callable[[], float],
    ) -> None:
        """`hold`: seconds that a node keeps the room that it reserved."""
        self._ownership = ownership
        self._resolving = resolving
        self._reach = reach
        self._inline = inline
        self._hold = hold
        self._clock = clock
        self._moving: set[InstanceKey] = set()
        self._tasks: set[asyncio.Task[Moved]] = set()

    @property
    def moving(self) -> frozenset[InstanceKey]:
        return frozenset(self._moving)

    def begin(self, wish: Wish, tell: Tell = lambda text: None) -> asyncio.Task[Moved]:
        """Starts a move that goes on if its caller leaves. `tell` is told what it does. See `move`."""
        task = asyncio.create_task(self.move(wish, tell), name=f"move {wish.key}")
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def move(self, wish: Wish, tell: Tell) -> Moved:
        """MOVE_GIVEN_UP, NO_ROOM and most others: nothing has changed. STORE_UNAVAILABLE leaves it open."""
        if wish.key in self._moving:
            raise _given_up(wish.key, "it is being moved already", "wait for that to end")
        self._moving.add(wish.key)
        try:
            return await self._move(wish, tell)
        finally:
            self._moving.discard(wish.key)

    def _ended(self, task: asyncio.Task[Moved]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) and not isinstance(error, RoostError):
            log.error("%s failed by a bug", task.get_name(), exc_info=error)

    async def _move(self, wish: Wish, tell: Tell) -> Moved:
        stored = await self._ownership.read(wish.key)
        if stored is None:
            raise RoostError(
                Reason.BAD_REQUEST,
                f"there is no instance {wish.key}",
                "one comes to be with its first message",
            )
        if stored.value.node == wish.target:
            live = stored.value.phase is not Phase.HIBERNATED
            return Moved(stored.value, wish.target, live, 0.0, 0)
        source = await self._resolving.node(stored.value.node)
        assert source is not None, "an owner has registered"
        agent = await self._resolving.agent(wish.key)
        one = _Move(self, wish, tell, source, agent, stored)
        return await one.run()


class _Move:
    """One move, from its choice of a target to the end."""

    def __init__(
        self,
        moves: Moves,
        wish: Wish,
        tell: Tell,
        source: NodeRecord,
        agent: AgentRecord,
        stored: Stored[InstanceRecord],
    ) -> None:
        self._ownership, self._resolving, self._reach = moves._ownership, moves._resolving, moves._reach
        self._hold, self._clock, self._inline = moves._hold, moves._clock, moves._inline
        self._wish = wish
        self._tell = tell
        self._source = source
        self._agent = agent
        self._stored = stored
        self._live = stored.value.phase is not Phase.HIBERNATED
        self._prefetched = 0

    async def run(self) -> Moved:
        refused = {self._source.info.id: "has it now"}
        for _ in range(_TRIES):
            target = await self._target(refused)
            need = self._agent.need.sized(self._stored.value.size)
            with self._resolving.counted(target.info.id, need) if self._live else nullcontext():
                try:
                    await self._prepare(target)
                except RoostError as refusal:
                    if self._wish.target is not None:
                        raise
                    refused[target.info.id] = f"refused ({refusal.message})"
                    continue
                return await self._hand_over(target)
        raise RoostError(Reason.NO_ROOM, f"{self._wish.key} stays: {', '.join(refused.values())}")

    async def _target(self, refused: dict[str, str]) -> NodeRecord:
        wanted = self._wish.target
        if wanted is None:
            need = self._agent.need.sized(self._stored.value.size)
            # Where its user is, is not known; they were near the source when it was chosen.
            client = Client(self._source.info.position)
            chosen = choose(need, self._resolving.candidates(refused), client)
            if isinstance(chosen, NoRoom):
                raise RoostError(
                    Reason.NO_ROOM,
                    f"no room for {self._wish.key} elsewhere: {chosen.why}",
                    "another node would help",
                )
            wanted = chosen.node
        node = await self._resolving.node(wanted)
        if node is None:
            raise RoostError(
                Reason.NODE_UNKNOWN,
                f"no node {wanted} has ever registered",
                "`roost nodes` lists those that have",
            )
        if node.state is NodeState.LOST or node.draining:
            state = "is lost" if node.state is NodeState.LOST else "is draining"
            raise _given_up(self._wish.key, f"{wanted} {state}", "choose another; `roost nodes` lists them")
        return node

    # --- while the source serves ---------------------------------------------------------------------

    async def _prepare(self, target: NodeRecord) -> None:
        """Again for what was committed meanwhile, so that little is left for the pause."""
        for round in range(_ROUNDS):
            record = self._stored.value
            self._tell(f"{target.info.id} prepares" + (f" for version {record.version}" if round else ""))
            prepare = link_pb2.Prepare(
                agent=self._agent.to_proto(),
                size=record.size.to_proto() if record.size else None,
                hold_ms=round_ms(self._hold) if self._live else 0,
                version=record.version,
                root=record.root,
                seen=round > 0,
                inline=await self._inline.of(record.key),
            )
            step = self._step(record.epoch + 1, prepare=prepare)
            self._prefetched += (await self._reach.move(target, step, _PREPARE)).bytes
            now = await self._ownership.read(self._wish.key)
            self._stored = self._same_owner(now)
            if self._stored.value.version == record.version:
                return

    def _same_owner(self, now: Stored[InstanceRecord] | None) -> Stored[InstanceRecord]:
        before = self._stored.value
        if now is None or (now.value.node, now.value.epoch) != (before.node, before.epoch):
            owner = now.value.node if now else "nobody"
            raise _given_up(self._wish.key, f"{owner} has become its owner meanwhile", "look where it is now")
        return now

    # --- the pause -----------------------------------------------------------------------------------

    async def _hand_over(self, target: NodeRecord) -> Moved:
        began = self._clock()
        released = await self._release()
        try:
            record = await self._place(target)
        except BaseException:
            if released is not None:
                await asyncio.shield(self._keep_on())
            raise
        if not self._live:
            record = (await self._ownership.hibernate(record.node, record.key, record.epoch)).value
            return self._moved(record, 0.0, "")
        trouble = ""
        self._tell(f"{target.info.id} starts it")
        try:
            await self._reach.move(target, self._step(record.epoch, ready=link_pb2.Ready()), _READY)
        except RoostError as error:
            trouble = error.message
        pause = self._clock() - (began if released is None else released)
        return self._moved(record, pause, trouble)

    async def _release(self) -> float | None:
        """Since when no turn can begin on the source, on this clock; None if it was not asked."""
        if self._source.state is NodeState.LOST:
            return None
        wish = self._wish
        turn = 0.0 if wish.now else wish.turn
        if not wish.now:
            self._tell(f"{self._source.info.id} ends the turn that runs, if any")
        release = link_pb2.Release(turn_ms=round_ms(turn), hold_ms=round_ms(_GATE))
        step = self._step(self._stored.value.epoch, release=release)
        try:
            reply = await self._reach.move(self._source, step, turn + _ANSWER)
        except RoostError as refusal:
            if wish.now:
                return None
            if refusal.reason is Reason.NODE_UNREACHABLE:  # it may yet have let go
                await asyncio.shield(self._keep_on())
            raise _given_up(wish.key, refusal.message, refusal.hint or "try again later") from refusal
        # What began to run since it was asked for, sleeps no more; what has ended since, starts anew.
        self._live = self._live or reply.live
        return self._clock() - reply.micros / 1e6

    async def _place(self, target: NodeRecord) -> InstanceRecord:
        wish = self._wish
        name = target.info.id
        why = f"moved from {self._source.info.id}: {wish.why}"
        home = name if wish.home or target.info.role is Role.EDGE else ""
        for _ in range(_LOOKS):
            outcome = await self._ownership.place(
                wish.key, self._stored, name, why, self._agent.version, home
            )
            if isinstance(outcome, Placed):
                return outcome.record.value
            self._stored = self._same_owner(outcome.record)
        raise _given_up(wish.key, "its record does not come to rest", "try again")

    async def _keep_on(self) -> None:
        try:
            step = self._step(self._stored.value.epoch, keep_on=link_pb2.KeepOn())
            await self._reach.move(self._source, step, _ANSWER)
        except RoostError as error:
            log.info(
                "%s takes turns of %s again in %g s: %s", self._source.info.id, self._wish.key, _GATE, error
            )

    def _moved(self, record: InstanceRecord, pause: float, trouble: str) -> Moved:
        log.info(
            "%s moved from %s to %s, epoch %d, version %d: pause %.1f ms, %d bytes fetched before%s",
            record.key,
            self._source.info.id,
            record.node,
            record.epoch,
            record.version,
            pause * 1000,
            self._prefetched,
            f"; not started: {trouble}" if trouble else "",
        )
        return Moved(record, self._source.info.id, self._live, pause, self._prefetched, trouble)

    def _step(
        self,
        epoch: int,
        prepare: link_pb2.Prepare | None = None,
        release: link_pb2.Release | None = None,
        ready: link_pb2.Ready | None = None,
        keep_on: link_pb2.KeepOn | None = None,
    ) -> link_pb2.MoveStep:
        return link_pb2.MoveStep(
            key=self._wish.key.to_proto(),
            epoch=epoch,
            prepare=prepare,
            release=release,
            ready=ready,
            keep_on=keep_on,
        )


def round_ms(seconds: float) -> int:
    return round(seconds * 1000)


def _given_up(key: InstanceKey, why: str, hint: str) -> RoostError:
    return RoostError(Reason.MOVE_GIVEN_UP, f"{key} stays where it is: {why}", hint)
