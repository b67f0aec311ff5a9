"""One instance on this node: it wakes, takes turns one after another, commits each, and sleeps.

Always true:
- Turns are serial, and a turn once begun goes on to its end even if its client leaves.
- A reply is marked committed only after the commit transaction succeeded; a turn whose id is in the
  committed manifest is not run again: its recorded reply is returned.
- A turn that fails, or whose commit has no certain outcome, leaves no process behind: the next one starts
  from what the coordinator says is committed. So a half-done turn can't leak into a later one.
- Once evicted, an instance never runs again under this object.

How it can fail: the process dies (JailGone), the agent misbehaves (an error of `edge_agent.turns`), the
files can't be put back (RESTORE_INCOMPLETE: it refuses, and starts nothing), the coordinator is out of
reach (TURN_NOT_COMMITTED, after a deadline), another node is the owner now (EPOCH_STALE).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace

from edge_agent.control import Agent, CommittedState
from edge_agent.freezer import Freezer
from edge_agent.jail.api import Jail, JailGone, JailSpec
from edge_agent.jail.python import python_argv
from edge_agent.phases import Asleep, Done, Live, Lost, Parts, State
from edge_agent.records import NodeRecord
from edge_agent.starts import Exec, FromZygote, Parked, Way, is_agents_fault, name_of
from edge_agent.state.index import Index
from edge_agent.turns import Deltas, Turn, crash, run_turn, wait_ready
from protos.v1 import common_pb2
from shared.errors import Reason, RoostError
from shared.identity import InstanceKey
from shared.manifest import StateManifest

log = logging.getLogger(__name__)

FETCH_SECONDS = 5.0
_MAX_QUEUED = 16  # turns of one instance, of up to 1 MiB each
TELL_SECONDS = 2.0


class Instance:
    def __init__(self, key: InstanceKey, epoch: int, jail_id: str, parts: Parts) -> None:
        self.key = key
        self.epoch = epoch
        self.jail_id = jail_id
        self.state: State = Asleep(told=True)
        self.idle_since = parts.clock()
        self.attached = 0  # clients' streams
        self.freezer = Freezer()
        self._parts = parts
        self._lock = asyncio.Lock()
        self._evicted: str | None = None  # why
        self._queued = 0  # turns, with the one that runs
        self._jail: Jail | None = None  # of the state Live, and of the way there

    def __repr__(self) -> str:
        return f"<Instance {self.key} epoch {self.epoch} {type(self.state).__name__.lower()}>"

    @property
    def forgettable(self) -> bool:
        """Nothing here that the records do not say."""
        return self.state == Asleep(told=True) and not self.attached and not self.busy

    @property
    def busy(self) -> bool:
        return self._lock.locked()

    @property
    def version(self) -> int:
        """The last committed version of its process; 0 if it has none."""
        return self.state.manifest.version if isinstance(self.state, Live) else 0

    # --- turns -------------------------------------------------------------------------------

    async def turn(self, turn: Turn, deltas: Deltas) -> Done:
        """Runs a turn and commits it, or finds it committed. RoostError if its state change did not happen
        (or, for TURN_NOT_COMMITTED, may or may not have: sending it again tells)."""
        async with self._one_at_a_time():
            try:
                return await self._turn(turn, deltas)
            except JailGone as gone:
                await self._sleep()
                raise self._eviction() or crash(gone.exit) from gone
            except RoostError as error:
                if error.reason is Reason.EPOCH_STALE and self._evicted is None:
                    self._evicted = error.message
                await self._sleep()
                raise self._eviction() or self._suspension(error) or error from error
            except BaseException:
                await self._sleep()
                raise
            finally:
                self.idle_since = self._parts.clock()

    @asynccontextmanager
    async def _one_at_a_time(self) -> AsyncIterator[None]:
        if self._queued >= _MAX_QUEUED:
            raise RoostError(
                Reason.DEADLINE, f"{_MAX_QUEUED} turns of {self.key} wait already", "send it again in a while"
            )
        self._queued += 1
        try:
            async with self._lock:
                yield
        finally:
            self._queued -= 1

    async def _turn(self, turn: Turn, deltas: Deltas) -> Done:
        for _ in range(2):  # an agent that ended between turns is started again, once
            self._check_owner()
            match self.state:
                case Live() as live:
                    resumed_from = common_pb2.LIVE
                case _:
                    self.state = Asleep(told=False)  # a fetch counts as waking, whatever comes of it
                    committed = await self._parts.control.fetch(self.key, self.epoch, FETCH_SECONDS)
                    manifest = await self._parts.state.load(self.key, committed.version, committed.root)
                    if done := self._replay(manifest, turn, common_pb2.DISK):
                        return done
                    live = await self._start(committed, manifest)
                    resumed_from = live.resumed_from
            if done := self._replay(live.manifest, turn, resumed_from):
                return done
            self._parts.records.set_busy(self.jail_id)
            try:
                reply = await run_turn(live.jail, turn, deltas, live.agent.policy.run.turn_timeout)
            except JailGone:
                await self._sleep()
                continue
            return await self._commit(live, turn, reply, resumed_from)
        raise RoostError(Reason.AGENT_CRASHED, "the agent ends whenever it has nothing to do")

    def _replay(
        self, manifest: StateManifest, turn: Turn, resumed_from: common_pb2.ResumedFrom.ValueType
    ) -> Done | None:
        recorded = manifest.turn(turn.id)
        if recorded is None:
            return None
        if recorded.reply is None:
            raise RoostError(
                Reason.TURN_REPLY_GONE,
                f"turn {turn.id} was applied, but its reply is no longer kept",
                "send new messages under new turn ids",
            )
        receipt = self._receipt(manifest.version, resumed_from, manifest.version)
        receipt.replayed = True
        return Done(recorded.reply, receipt)

    def _receipt(
        self, version: int, resumed_from: common_pb2.ResumedFrom.ValueType, resumed_version: int
    ) -> common_pb2.Receipt:
        return common_pb2.Receipt(
            node=self._parts.node,
            epoch=self.epoch,
            version=version,
            resumed_from=resumed_from,
            resumed_version=resumed_version,
        )

    # --- commit ------------------------------------------------------------------------------

    async def _commit(
        self, live: Live, turn: Turn, reply: str, resumed_from: common_pb2.ResumedFrom.ValueType
    ) -> Done:
        try:
            async with self.freezer.frozen("capture"):
                captured = await self._parts.state.capture(live.jail.files, live.index)
        except JailGone as gone:  # it replied and ended, before its files could be read
            raise crash(gone.exit) from gone
        base = live.manifest
        manifest = replace(base, epoch=self.epoch, version=base.version + 1, nodes=captured.nodes).with_turn(
            turn.id, reply
        )
        root, index = await self._parts.commits.publish(
            self.key, captured, manifest, turn.id, lambda: self._evicted is not None
        )
        self.state = replace(live, manifest=manifest, index=index)
        try:
            await self._record(live.agent, manifest, root, index)
        except RoostError:  # the turn is committed all the same; only this node can't go on with it
            log.exception("%r: a committed turn is not recorded here, so its process ends", self)
            await self._sleep()
        return Done(reply, self._receipt(manifest.version, resumed_from, base.version))

    async def _record(self, agent: Agent, manifest: StateManifest, root: str, index: Index) -> None:
        text = await asyncio.to_thread(index.to_json)  # of a large tree it takes a while
        self._parts.records.put(
            NodeRecord(self.jail_id, self.key, self.epoch, manifest.version, root, agent, False, text)
        )

    # --- waking and sleeping -----------------------------------------------------------------

    async def _start(self, committed: CommittedState, manifest: StateManifest) -> Live:
        agent, parts = committed.agent, self._parts
        parts.reservations.claim(self.key, self.epoch, agent.policy.need, parts.clock())
        await parts.state.bundles.ensure(agent.version, agent.bundle_root)
        known = parts.records.get(self.jail_id)
        lay = await asyncio.to_thread(_index_of, known) if known else None
        for way in parts.starts.ways(agent, is_new_here=known is None):
            began = parts.clock()
            try:
                index = await self._start_by(way, committed, manifest, lay)
            except (RoostError, JailGone) as error:
                if isinstance(way, Exec) or is_agents_fault(error):
                    raise
                log.warning("%s can't be started by %s: %s", self.key, name_of(way), error)
                continue
            log.info("%s: %s, %.1f ms", self.key, name_of(way), (parts.clock() - began) * 1000)
            break
        if committed.version == 0:
            resumed_from = common_pb2.NEW
        elif known and lay and known.version == committed.version:
            resumed_from = common_pb2.DISK
        else:
            resumed_from = common_pb2.BLOBS
        assert self._jail is not None
        self.state = live = Live(self._jail, agent, manifest, index, resumed_from)
        return live

    async def _start_by(
        self, way: Way, committed: CommittedState, manifest: StateManifest, lay: Index | None
    ) -> Index:
        """Leaves the running agent's jail in `_jail`, or nothing behind."""
        parts, run = self._parts, committed.agent.policy.run
        own_id = self.jail_id
        jail = way.jail if isinstance(way, Parked) else await self._make(committed.agent, way)
        self._jail = jail
        try:
            self.jail_id = jail.jail_id
            self.freezer.attach(jail)
            if isinstance(way, Parked) and committed.version == 0:
                index = parts.state.nothing()
            else:
                index = await parts.state.restore(jail.files, manifest, lay)
            await self._record(committed.agent, manifest, committed.root, index)
            self._check_owner()
            if not isinstance(way, Parked):
                await jail.start()
                await wait_ready(jail, run.start_timeout)
        except BaseException:
            self._jail = None
            self.freezer.detach()
            await jail.kill()
            if isinstance(way, Parked):
                self.jail_id = own_id
                parts.records.delete(jail.jail_id)
                with suppress(RoostError):  # then the next start of the node removes it
                    await parts.jails.discard(jail.jail_id)
            raise
        return index

    async def _make(self, agent: Agent, way: Way) -> Jail:
        policy = agent.policy
        return await self._parts.jails.make(
            JailSpec(
                jail_id=self.jail_id,
                bundle=agent.version,
                argv=python_argv(policy.run.entry),
                limits=policy.need,
                zygote=way.jail_id if isinstance(way, FromZygote) else "",
            )
        )

    async def adopt(self, jail: Jail, record: NodeRecord) -> None:
        """Goes on with a jail that an earlier daemon of this node started and left between turns.

        No need to ask what is committed: only this node can have committed in this epoch, and it was not
        at it. If the epoch is over, the coordinator says so when the node registers.
        """
        manifest = await self._parts.state.load(self.key, record.version, record.root)
        self._parts.reservations.claim(self.key, self.epoch, record.agent.policy.need, self._parts.clock())
        self._jail = jail
        self.freezer.attach(jail)
        self.state = Live(jail, record.agent, manifest, _index_of(record), common_pb2.LIVE)

    async def _sleep(self) -> None:
        """Ends the process, if any; what is not committed is gone."""
        state = self.state
        if not isinstance(state, Lost):
            self.state = Asleep(told=False)
        try:
            if isinstance(state, Live):
                self._jail = None
                self.freezer.detach()
                await state.jail.kill()
        finally:
            self._parts.reservations.release(self.key, self.epoch)

    async def hibernate_if_idle(self, now: float) -> bool:
        """Ends the process if nobody has talked to it for the policy's idle_timeout."""
        live = self.state
        if (
            self.busy
            or not isinstance(live, Live)
            or now - self.idle_since < live.agent.policy.run.idle_timeout
        ):
            return False
        async with self._lock:
            await self._sleep()
        return True

    async def tell(self) -> None:
        """Tells the coordinator that the instance sleeps, if it does not know yet."""
        if self.busy or self.state != Asleep(told=False):
            return
        async with self._lock:
            try:
                await self._parts.control.hibernated(self.key, self.epoch, TELL_SECONDS)
            except RoostError as error:
                if error.reason is not Reason.EPOCH_STALE:
                    raise
                self._evicted = error.message
            self.state = Asleep(told=True)

    # --- ownership ---------------------------------------------------------------------------

    async def evict(self, why: str) -> None:
        """Ends it for good, in the middle of a turn if need be. Its files may then be discarded."""
        self._evicted = why
        if self._jail is not None:
            await self._jail.kill()
        async with self._lock:
            await self._sleep()
            self.state = Lost(why)
            self._parts.records.delete(self.jail_id)

    @property
    def evicted(self) -> str | None:
        """Why it may not run here any more, if so."""
        return self._evicted

    def _eviction(self) -> RoostError | None:
        if self._evicted is None:
            return None
        return RoostError(
            Reason.EPOCH_STALE,
            f"node {self._parts.node} does not own {self.key} any more: {self._evicted}",
            "resolve again, and send the turn again under the same id",
        )

    def _suspension(self, error: RoostError) -> RoostError | None:
        """A node that stood still sees deadlines pass that were nobody's fault: it must not judge by them."""
        if error.reason is Reason.EPOCH_STALE or self._parts.tenure.trusted(self._parts.clock()):
            return None
        return RoostError(
            Reason.NODE_SUSPENDED,
            f"node {self._parts.node} lost touch with its coordinator during the turn ({error.message})",
            "resolve again, and send the turn again under the same id",
        )

    def _check_owner(self) -> None:
        if eviction := self._eviction():
            raise eviction


def _index_of(record: NodeRecord | None) -> Index | None:
    return Index.from_json(record.index) if record is not None and record.index else None
