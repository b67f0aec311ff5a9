"""Resolve: where is the instance, or where shall it be?

`decide` says, purely, what an instance's record and its owner's state call for. `Resolving` does it: it asks
the chosen node to reserve (the node has the last word on room), and only then makes it the owner. A
reservation whose transaction lost a race is not taken back: it runs out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol, assert_never

from coordinator.cache import Cache
from coordinator.ownership import Overtaken, Ownership, Placed
from coordinator.placement import Candidate, Client, NoRoom, choose
from coordinator.records import (
    AgentRecord,
    InstanceRecord,
    NodeRecord,
    NodeState,
    Phase,
    Role,
    Stored,
    agent_key,
    node_key,
)
from coordinator.store.base import Store
from protos.v1 import link_pb2
from shared.errors import Reason, RoostError
from shared.failpoints import failpoint
from shared.identity import InstanceKey
from shared.resources import Resources

_LOOKS = 8  # at the record, each after losing to another writer
_TRIES = 8  # nodes that are asked for room

_REFUSALS = {
    Reason.NODE_FULL: "is full",
    Reason.NODE_UNREACHABLE: "does not answer",
    Reason.NODE_SUSPENDED: "is suspended",
    Reason.NODE_STOPPING: "is stopping",
}


# --- what the state of things calls for ------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Answer:
    """The owner is alive and has it."""

    record: Stored[InstanceRecord]


@dataclass(frozen=True, slots=True)
class Wake:
    """It sleeps on a live node, which must keep room for it, or else it moves."""

    record: Stored[InstanceRecord]


@dataclass(frozen=True, slots=True)
class Challenge:
    """The records say that its owner is alive, but it just failed this client."""

    record: Stored[InstanceRecord]


@dataclass(frozen=True, slots=True)
class Move:
    """A new owner. `because` completes "moved from edge-1, which ..."; with `may_stay`, it stays where it
    is when nobody else has room."""

    record: Stored[InstanceRecord] | None
    because: str = ""
    may_stay: bool = False


Step = Answer | Wake | Challenge | Move


def decide(record: Stored[InstanceRecord] | None, owner: NodeRecord | None, exclude: frozenset[str]) -> Step:
    if record is None or not record.value.node:  # the latter was imported, and never was anywhere
        return Move(record)
    if owner is None or owner.state is NodeState.LOST:
        return Move(record, "is lost")
    if owner.info.id in exclude:
        return Challenge(record)
    if owner.draining:
        return Move(record, "is draining", may_stay=True)
    return stay(record)


def stay(record: Stored[InstanceRecord]) -> Answer | Wake:
    """What a live owner that keeps the instance calls for."""
    return Wake(record) if record.value.phase is Phase.HIBERNATED else Answer(record)


# --- doing it --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Resolved:
    record: InstanceRecord
    address: str


class Asked(Protocol):
    """Nodes that can be asked, wherever their links are. Real: `coordinator.reach.Reach`."""

    async def reserve(self, node: NodeRecord, reserve: link_pb2.Reserve) -> None:
        """Returns if the node keeps room; its refusal or NODE_UNREACHABLE otherwise."""
        ...

    async def is_fresh(self, node: NodeRecord) -> bool:
        """Is its link open at this moment, and was the node heard just now?"""
        ...


class Resolving:
    def __init__(self, store: Store, cache: Cache, ownership: Ownership, reach: Asked, hold: float) -> None:
        """`hold`: seconds that a node keeps the room that it reserved."""
        self._store = store
        self._cache = cache
        self._ownership = ownership
        self._reach = reach
        self._hold = hold
        self._in_flight: defaultdict[str, Resources] = defaultdict(Resources)

    async def resolve(self, key: InstanceKey, client: Client) -> Resolved:
        """AGENT_UNKNOWN, NO_ROOM, NODE_UNREACHABLE, STORE_UNAVAILABLE."""
        record = self._cache.instance(key)
        for _ in range(_LOOKS):
            owner = await self._owner(record)
            step = decide(record, owner, client.exclude)
            if isinstance(step, Challenge):
                assert owner is not None
                step = await self._challenged(step, owner)
            if isinstance(step, Wake):
                assert owner is not None
                step = await self._woken(step, owner)
            match step:
                case Answer(found):
                    node = await self.node(found.value.node)
                    if node is not None:
                        return Resolved(found.value, node.info.address)
                    record = await self._ownership.read(key)
                case Move():
                    outcome = await self._move(key, step, client)
                    if isinstance(outcome, Resolved):
                        return outcome
                    record = outcome.record
                case _:
                    assert_never(step)
        raise RoostError(
            Reason.STORE_UNAVAILABLE, f"the record of {key} changed {_LOOKS} times meanwhile", "try again"
        )

    async def _challenged(self, step: Challenge, owner: NodeRecord) -> Move:
        if await self._reach.is_fresh(owner):
            return Move(step.record, "just failed the client")
        # Without the store nobody can take over: then that is what is wrong, and it says so here.
        await self._ownership.read(step.record.value.key)
        raise RoostError(
            Reason.NODE_UNREACHABLE,
            f"{step.record.value.key} is on {owner.info.id}, which can't be reached just now",
            "resolve again in a few seconds: either it is back then, or it counts as lost and another "
            "node takes over",
        )

    async def _woken(self, step: Wake, owner: NodeRecord) -> Answer | Move:
        record = step.record.value
        agent = await self.agent(record.key)
        try:
            await self._reserve(owner, record.key, record.epoch, agent, record.size)
        except RoostError as refusal:
            return Move(step.record, _REFUSALS.get(refusal.reason, "refused it"))
        return Answer(Stored(replace(record, agent_version=agent.version), step.record.revision))

    async def _move(self, key: InstanceKey, move: Move, client: Client) -> Resolved | Overtaken:
        """Asks one node after another, nearest first, until one keeps room for it."""
        agent = await self.agent(key)
        current = move.record.value if move.record else None
        if current is None:
            self._cache.check_quota(key, 0, is_new=True)
        size = current.size if current else None
        need = agent.need.sized(size)
        moved = current is not None and current.node != ""
        refused = {current.node: move.because} if current and moved and not move.may_stay else {}
        for _ in range(_TRIES):
            chosen = choose(need, self.candidates(refused), client)
            if isinstance(chosen, NoRoom):
                return await self._nowhere(key, move, chosen)
            node = await self.node(chosen.node)
            assert node is not None, "candidates come from the node table, which never forgets one"
            why = chosen.why
            if current and moved:
                why = f"moved from {current.node}, which {move.because}: {why}"
            with self.counted(chosen.node, need):
                try:
                    failpoint("coordinator.place.before_reservation")
                    await self._reserve(node, key, current.epoch + 1 if current else 1, agent, size)
                except RoostError as refusal:
                    refused[chosen.node] = _REFUSALS.get(refusal.reason, f"refused ({refusal.message})")
                    continue
                failpoint("coordinator.place.reserved")
                placed = await self._place(key, move.record, node, why, agent.version)
            if isinstance(placed, Placed):
                return Resolved(placed.record.value, node.info.address)
            return placed
        said = ", ".join(f"{node} {what}" for node, what in refused.items())
        raise RoostError(Reason.NO_ROOM, f"no room for {key}: {said}", "try again in a few seconds")

    async def _place(
        self,
        key: InstanceKey,
        expected: Stored[InstanceRecord] | None,
        node: NodeRecord,
        why: str,
        version: str,
    ) -> Placed | Overtaken:
        """Makes `node`, which has reserved, the owner. A commit that came between does not undo that: the
        reservation is for the next epoch, and that is still the next one."""
        name = node.info.id
        home = name if node.info.role is Role.EDGE else ""
        for _ in range(_LOOKS):
            outcome = await self._ownership.place(key, expected, name, why, version, home)
            if isinstance(outcome, Placed) or outcome.record is None or expected is None:
                return outcome
            if outcome.record.value.epoch != expected.value.epoch:
                return outcome
            expected = outcome.record
        return Overtaken(expected)

    async def _nowhere(self, key: InstanceKey, move: Move, no_room: NoRoom) -> Resolved:
        """It stays if it may. Then room where it is has to be kept too, if it sleeps."""
        if move.record is not None and move.may_stay:
            owner = await self._owner(move.record)
            kept = stay(move.record)
            if owner is not None and isinstance(kept, Wake):
                kept_or_moved = await self._woken(kept, owner)
                if isinstance(kept_or_moved, Answer):
                    return Resolved(kept_or_moved.record.value, owner.info.address)
            elif owner is not None:
                return Resolved(move.record.value, owner.info.address)
        await self._ownership.read(key)  # as in _challenged
        raise RoostError(
            Reason.NO_ROOM,
            f"no room for {key}: {no_room.why}",
            "try again in a while; `roost status` shows what is where; another node would help",
        )

    async def resize(
        self, key: InstanceKey, size_from: Callable[[Resources], Resources | None]
    ) -> tuple[InstanceRecord, Resources]:
        """Gives the instance the size that `size_from` makes of its present one (None: its policy's); returns
        what it has now. Its node, if it runs there, agrees first: NO_ROOM, and nothing has changed."""
        stored = await self._ownership.read(key)
        if stored is None:
            raise RoostError(
                Reason.BAD_REQUEST, f"there is no instance {key}", "one comes to be with its first message"
            )
        record, agent = stored.value, await self.agent(key)
        size = size_from(agent.need.sized(record.size))
        need = agent.need.sized(size)
        if record.phase is not Phase.HIBERNATED:
            await self._resize_on(record, agent, need)
        resized = await self._ownership.resize(record.node, key, record.epoch, size)
        return resized.value, need

    async def _resize_on(self, record: InstanceRecord, agent: AgentRecord, need: Resources) -> None:
        node = await self.node(record.node)
        assert node is not None, "an owner has registered"
        more = need - agent.need.sized(record.size)
        with self.counted(record.node, more):
            try:
                await self._reserve(node, record.key, record.epoch, agent, need, resize=True)
            except RoostError as refusal:
                if refusal.reason is not Reason.NODE_FULL:
                    raise
                raise RoostError(
                    Reason.NO_ROOM,
                    f"{record.key} stays as large as it was: {refusal.message}",
                    f"choose less, or let it move to a roomier node: `roost drain {record.node}`",
                ) from refusal

    async def _reserve(
        self,
        node: NodeRecord,
        key: InstanceKey,
        epoch: int,
        agent: AgentRecord,
        size: Resources | None,
        resize: bool = False,
    ) -> None:
        await self._reach.reserve(
            node,
            link_pb2.Reserve(
                key=key.to_proto(),
                epoch=epoch,
                agent=agent.to_proto(),
                hold_ms=round(self._hold * 1000),
                size=size.to_proto() if size else None,
                resize=resize,
            ),
        )

    @contextmanager
    def counted(self, node: str, need: Resources) -> Iterator[None]:
        """Room asked for counts as taken until the record of it is in the cache, or it was refused."""
        self._in_flight[node] += need
        try:
            yield
        finally:
            self._in_flight[node] -= need

    def candidates(self, refused: dict[str, str]) -> list[Candidate]:
        """All nodes, as placement sees them; `refused`: those that will not do, and why."""
        return [
            Candidate(
                id=node.info.id,
                role=node.info.role,
                position=node.info.position,
                capacity=node.info.capacity,
                reserved=self._cache.reserved(node.info.id) + self._in_flight[node.info.id],
                up=node.state is NodeState.UP,
                draining=node.draining,
                refused=refused.get(node.info.id, ""),
            )
            for node in (stored.value for stored in self._cache.nodes.records.values())
        ]

    async def _owner(self, record: Stored[InstanceRecord] | None) -> NodeRecord | None:
        """The state of the record's owner. That it is lost is only said of what the store says now: a move
        costs the user a restart, so a cache that lags must not cause one."""
        if record is None:
            return None
        known = self._cache.node(record.value.node)
        if known is not None and known.value.state is NodeState.UP:
            return known.value
        return await self._read_node(record.value.node)

    async def node(self, node: str) -> NodeRecord | None:
        """As last heard of. None: it never registered."""
        known = self._cache.node(node)
        return known.value if known else await self._read_node(node)

    async def _read_node(self, node: str) -> NodeRecord | None:
        found = await self._store.get(node_key(node))
        if found is None:
            return None
        stored = NodeRecord.decode(found)
        self._cache.nodes.learn(node_key(node), stored)
        return stored.value

    def check_quota(self, key: InstanceKey, state_bytes: int) -> None:
        """TENANT_QUOTA if a commit may not make the instance so large."""
        self._cache.check_quota(key, state_bytes)

    async def agent(self, key: InstanceKey) -> AgentRecord:
        """As last deployed. The cache may not have heard of it yet, so only the store can deny it."""
        if known := self._cache.agent(key.tenant, key.agent):
            return known
        found = await self._store.get(agent_key(key.tenant, key.agent))
        if found is None:
            raise RoostError(
                Reason.AGENT_UNKNOWN,
                f"no agent {key.agent} is deployed for tenant {key.tenant}",
                "deploy it with `roost deploy DIR`; `roost status` lists those that are",
            )
        stored = AgentRecord.decode(found)
        self._cache.agents.learn(found.key, stored)
        return stored.value
