"""One instance on this node: it wakes, takes turns one after another, commits each, and sleeps.

Always true:
- Turns are serial, and a turn once begun goes on to its end even if its client leaves.
- A reply's receipt says durable only after the commit transaction succeeded; a turn whose id is in the
  committed manifest is not run again: its recorded reply is returned.
- Whoever waits for a turn is told as soon as it is committed; only then it is written down on this node. The
  next turn begins after that, and a daemon that starts before it finds the process in the middle of a turn.
- With durability "async" a reply may be given out before its commit, while this node may believe that it is
  the owner. The next turn may begin then, and its own commit waits for that one: at most one turn is behind.
  If that one fails, what built on it ends, and clients are told what they lost (`edge_agent.losses`).
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
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

from edge_agent import refusals
from edge_agent.behind import Behind
from edge_agent.control import Agent, Beside, CommittedState
from edge_agent.effects import Effects
from edge_agent.freezer import Freezer
from edge_agent.jail.api import Jail, JailGone
from edge_agent.phases import Asleep, Done, Live, Lost, Parts, State
from edge_agent.process import Process
from edge_agent.records import NodeRecord
from edge_agent.speakers import speaker_of
from edge_agent.state.index import Index
from edge_agent.state.snapshot import Snapshot
from edge_agent.tasks import TurnTasks, suspended
from edge_agent.turns import Turn, crash
from edge_agent.under_way import UnderWay
from protos.v1 import common_pb2
from shared.errors import Reason, RoostError
from shared.failpoints import failpoint
from shared.identity import InstanceKey
from shared.manifest import StateManifest
from shared.policy import Durability
from shared.resources import Resources

log = logging.getLogger(__name__)

FETCH_SECONDS = 5.0
_MAX_QUEUED = 16  # turns of one instance, of up to 1 MiB each
TELL_SECONDS = 2.0
_TO_TELL = 3  # turns of the loop after which a reply is on its way


class Instance:
    def __init__(self, key: InstanceKey, epoch: int, jail_id: str, parts: Parts) -> None:
        self.key = key
        self.epoch = epoch
        self.state: State = Asleep(told=True)
        self.idle_since = parts.clock()
        self.attached = 0  # clients' streams
        self._parts = parts
        self._process = Process(key, epoch, jail_id, parts, self._may_leave, self._check_owner)
        self._lock = asyncio.Lock()
        self._behind = Behind(self._lost_behind)
        self._evicted: str | None = None  # why
        self._queued = 0  # turns, with the one that runs
        self._told = False  # the one that runs is committed, and whoever waits for it knows
        self._tasks: TurnTasks | None = None  # of the turn that runs
        self._effects = Effects(key, epoch, parts.control)

    def __repr__(self) -> str:
        return f"<Instance {self.key} epoch {self.epoch} {type(self.state).__name__.lower()}>"

    @property
    def jail_id(self) -> str:
        return self._process.jail_id

    @property
    def freezer(self) -> Freezer:
        return self._process.freezer

    @property
    def forgettable(self) -> bool:
        """Nothing here that the records do not say."""
        return self.state == Asleep(told=True) and not self.attached and not self.busy

    @property
    def busy(self) -> bool:
        return self._lock.locked() or self._behind.busy

    @property
    def version(self) -> int:
        """The last committed version of its process; 0 if it has none."""
        if not isinstance(self.state, Live):
            return 0
        return self.state.manifest.version - bool(self._behind.busy or self._behind.failure)

    # --- turns -------------------------------------------------------------------------------

    async def turn(self, asked: UnderWay) -> Done:
        """Runs a turn and commits it, or finds it committed. RoostError if its state change did not happen
        (or, for TURN_NOT_COMMITTED, may or may not have: sending it again tells)."""
        async with self._one_at_a_time(asked):
            try:
                return await self._turn(asked)
            except JailGone as gone:
                error = self._eviction() or self._setback() or crash(gone.exit)
                await self._sleep()
                raise error from gone
            except RoostError as error:
                if error.reason is Reason.EPOCH_STALE and self._evicted is None:
                    self._evicted = error.message
                told = self._told_instead(error) or error
                await self._sleep()
                raise told from error
            except BaseException:
                await self._sleep()
                raise
            finally:
                self.idle_since = self._parts.clock()

    @asynccontextmanager
    async def _one_at_a_time(self, asked: UnderWay) -> AsyncIterator[None]:
        unanswered = self._queued - self._told
        if unanswered >= _MAX_QUEUED:
            raise refusals.too_many(self.key, _MAX_QUEUED)
        self._queued += 1
        try:
            if self._lock.locked() and (unanswered or not self._told):
                asked.deltas.note("another turn is under way")
            await self._wait_for(asked)
            try:
                yield
            finally:
                self._told = False
                self._lock.release()
        finally:
            self._queued -= 1

    async def _wait_for(self, asked: UnderWay) -> None:
        try:
            async with asked.interruptible():
                await self._lock.acquire()
        except RoostError:
            if isinstance(self.state, Live) and self.state.manifest.turn(asked.turn.id) is None:
                raise
            # It may have been applied before it was sent again: that is to be looked up first.
            await self._lock.acquire()

    async def _turn(self, asked: UnderWay) -> Done:
        for _ in range(2):  # an agent that ended between turns is started again, once
            failpoint("node.turn.taken")
            self._check_owner()
            await self._stand_on_firm_ground(asked.turn)
            match self.state:
                case Live() as live:
                    resumed_from = live.resumed_from
                case _:
                    committed, manifest = await self._fetched()
                    if done := self._replay(manifest, asked.turn, common_pb2.DISK):
                        return done
                    asked.check()
                    self.state = live = await self._process.start(committed, manifest, asked.deltas.note)
                    resumed_from = live.resumed_from
            if done := self._replay(live.manifest, asked.turn, resumed_from):
                return done
            asked.check()
            self._process.turn_begins()
            try:
                async with asked.interruptible():
                    reply, beside = await self._run(live, asked)
            except JailGone:
                await self._sleep()
                continue
            failpoint("node.turn.replied")
            asked.commits()
            return await self._commit(asked, reply, resumed_from, beside)
        raise RoostError(Reason.AGENT_CRASHED, "the agent ends whenever it has nothing to do")

    async def _stand_on_firm_ground(self, turn: Turn) -> None:
        """What is looked up or woken from is committed; what runs builds on no commit that failed."""
        if not isinstance(self.state, Live) or self.state.manifest.turn(turn.id):
            await self._behind.wait()
        if self._behind.failure:
            await self._sleep()

    async def _fetched(self) -> tuple[CommittedState, StateManifest]:
        """What the mesh has of it. Asking counts as waking, whatever comes of it."""
        self.state = Asleep(told=False)
        committed = await self._parts.control.fetch(self.key, self.epoch, FETCH_SECONDS)
        self._effects.woken(committed.unfinished)
        state = self._parts.state.beside(committed.inline)
        return committed, await state.load(self.key, committed.version, committed.root)

    async def _run(self, live: Live, asked: UnderWay) -> tuple[str, Beside]:
        """The reply, and what becomes true with it. When it is there, the commit of the turn before has ended
        well."""
        run = live.agent.policy.run
        if live.agent.policy.state.durability is Durability.STRICT:
            asked.deltas.hold()
        turn = asked.turn
        self._tasks = tasks = self._parts.tasks.of_turn(live.agent, live.jail, turn.id)
        try:
            calls = await self._effects.of_turn(turn.id, turn.timer, live.jail, tasks.tell)
            failpoint("node.turn.before_agent")
            speaking = speaker_of(run).turn(live.jail, turn, asked.deltas, tasks, calls, run.turn_timeout)
            reply = await calls.around(speaking)
        finally:
            self._tasks = None
        await self._behind.wait()
        if error := self._setback():
            raise error
        return reply, calls.beside()

    def _replay(
        self, manifest: StateManifest, turn: Turn, resumed_from: common_pb2.ResumedFrom.ValueType
    ) -> Done | None:
        recorded = manifest.turn(turn.id)
        if recorded is None:
            return None
        if recorded.reply is None:
            raise refusals.reply_gone(turn.id)
        receipt = self._receipt(manifest.version, resumed_from, manifest.version)
        receipt.replayed = True
        return Done(recorded.reply, receipt, manifest)

    def _receipt(
        self, version: int, resumed_from: common_pb2.ResumedFrom.ValueType, resumed_version: int
    ) -> common_pb2.Receipt:
        return common_pb2.Receipt(
            node=self._parts.node,
            epoch=self.epoch,
            version=version,
            resumed_from=resumed_from,
            resumed_version=resumed_version,
            durable=True,
        )

    # --- commit ------------------------------------------------------------------------------

    async def _commit(
        self, asked: UnderWay, reply: str, resumed_from: common_pb2.ResumedFrom.ValueType, beside: Beside
    ) -> Done:
        live, turn = self.state, asked.turn
        assert isinstance(live, Live)
        try:
            captured = await self._process.capture(live)
        except JailGone as gone:  # it replied and ended, before its files could be read
            raise crash(gone.exit) from gone
        failpoint("node.commit.captured")
        base = live.manifest
        manifest = replace(
            base,
            epoch=self.epoch,
            version=base.version + 1,
            nodes=captured.nodes,
            parent=live.root,
            made_ms=time.time_ns() // 1_000_000,
            node=self._parts.node,
            note="",
        ).with_turn(turn.id, reply)
        done = Done(reply, self._receipt(manifest.version, resumed_from, base.version), base)
        # A node that may have lost the instance gives nothing out that is not committed.
        if live.agent.policy.state.durability is Durability.ASYNC and self._may_leave():
            done.receipt.durable = False
            self.state = replace(live, manifest=manifest, index=captured.index, resumed_from=common_pb2.LIVE)
            behind = self._publish_behind(live.agent, captured, manifest, turn.id, beside, base)
            self._behind.begin(behind, f"commit of {self.key} version {manifest.version}")
            return done
        root, index = await self._publish(captured, manifest, turn.id, beside, base)
        self.state = replace(live, manifest=manifest, index=index, root=root, resumed_from=common_pb2.LIVE)
        asked.end(done)
        self._told = True
        await self._settle(live.agent, manifest, root, index)
        return done

    async def _settle(self, agent: Agent, manifest: StateManifest, root: str, index: Index) -> None:
        """What the next turn needs, and whoever waits for this one does not."""
        for _ in range(_TO_TELL):
            await asyncio.sleep(0)
        try:
            failpoint("node.commit.told")
            await self._process.record(agent, manifest, root, index)
            await self.freezer.settled()
            failpoint("node.commit.recorded")
        except RoostError:  # the turn is committed all the same; only this node can't go on with it
            log.exception("%r: a committed turn is not recorded here, or its jail not thawed; it ends", self)
            await self._sleep()

    async def _publish(
        self, captured: Snapshot, manifest: StateManifest, turn_id: str, beside: Beside, base: StateManifest
    ) -> tuple[str, Index]:
        root, index = await self._parts.commits.publish(
            self.key, captured, manifest, turn_id, lambda: self._evicted is not None, beside, base
        )
        failpoint("node.commit.answered")
        self._effects.ended(turn_id)
        self._parts.offer(self.key, manifest.version, root)
        return root, index

    async def _publish_behind(
        self,
        agent: Agent,
        captured: Snapshot,
        manifest: StateManifest,
        turn_id: str,
        beside: Beside,
        base: StateManifest,
    ) -> None:
        """The next turn may be under way meanwhile, or may have failed."""
        root, index = await self._publish(captured, manifest, turn_id, beside, base)
        if isinstance(self.state, Live):
            self.state = replace(self.state, index=index, root=root)
        try:
            await self._process.record(agent, manifest, root, index)
        except RoostError:  # its record says that a turn was under way: then it is not gone on with
            log.exception("%r: a committed turn is not recorded here", self)

    async def _lost_behind(self, error: RoostError) -> None:
        log.warning("%s: a turn is lost that was given out before its commit: %s", self.key, error.message)
        if error.reason is Reason.EPOCH_STALE and self._evicted is None:
            self._evicted = error.message
        await self._process.kill()

    async def settled(self) -> None:
        """Waits until no commit is under way behind its turns."""
        await self._behind.wait()

    async def stop(self) -> None:
        """The daemon ends. A commit that is under way may or may not come about."""
        await self._behind.cancel()

    # --- waking and sleeping -----------------------------------------------------------------

    async def adopt(self, jail: Jail, record: NodeRecord) -> None:
        """See `Process.adopt`."""
        self.state = await self._process.adopt(jail, record)

    async def resize(self, need: Resources) -> bool:
        """See `Process.resize`."""
        return await self._process.resize(need)

    async def _sleep(self) -> None:
        """Ends the process, if any; what is not committed is gone."""
        if not isinstance(self.state, Lost):
            self.state = Asleep(told=False)
        self._behind.failure = None
        await self._process.end()

    async def wake(self) -> None:
        """Starts its process, if it has none, before anybody calls."""
        async with self._lock:
            if isinstance(self.state, Live):
                return
            try:
                self._check_owner()
                self.state = await self._process.start(*await self._fetched(), lambda text: None)
            except BaseException as error:
                await self._sleep()
                if isinstance(error, JailGone):
                    raise self._eviction() or crash(error.exit) from error
                raise
            finally:
                self.idle_since = self._parts.clock()

    @asynccontextmanager
    async def between_turns(self, timeout: float) -> AsyncIterator[None]:
        """No turn runs and the jail stands still while the block lasts; turns that come wait. MOVE_GIVEN_UP
        if one runs on for `timeout` seconds, EPOCH_STALE if this node does not own it."""
        try:
            async with asyncio.timeout(timeout):
                await self._lock.acquire()
        except TimeoutError as error:
            raise refusals.turn_goes_on(self.key, timeout) from error
        try:
            await self._behind.wait()
            self._check_owner()
            async with self.freezer.frozen("move"):
                yield
        finally:
            self._lock.release()

    async def hibernate_if_idle(self, now: float, after: float | None = None) -> bool:
        """Ends the process if nobody has talked to it for `after` seconds: by default the policy's."""
        live = self.state
        if self.busy or not isinstance(live, Live):
            return False
        after = live.agent.policy.run.idle_timeout if after is None else after
        if now - self.idle_since < after and not self._behind.failure:
            return False
        async with self._lock:
            failpoint("node.sleep.before_end")
            await self._sleep()
        return True

    async def tell(self) -> None:
        """Tells the coordinator that the instance sleeps, if it does not know yet."""
        if self.busy or self.state != Asleep(told=False):
            return
        async with self._lock:
            try:
                failpoint("node.sleep.before_tell")
                await self._parts.control.hibernated(self.key, self.epoch, TELL_SECONDS)
            except RoostError as error:
                if error.reason is not Reason.EPOCH_STALE:
                    raise
                self._evicted = error.message
            self.state = Asleep(told=True)

    # --- ownership ---------------------------------------------------------------------------

    async def suspend(self, reason: str) -> None:
        """Freezes it while this node may not be its owner. Its tasks end: they are not worth keeping."""
        if self._tasks is not None:
            self._tasks.end(suspended())
        await self.freezer.hold(reason)

    async def evict(self, why: str) -> None:
        """Ends it for good, in the middle of a turn if need be. Its files may then be discarded."""
        self._evicted = why
        await self._process.kill()
        await self._behind.cancel()
        async with self._lock:
            await self._sleep()
            self.state = Lost(why)
            self._parts.records.delete(self.jail_id)

    @property
    def evicted(self) -> str | None:
        """Why it may not run here any more, if so."""
        return self._evicted

    def _eviction(self) -> RoostError | None:
        return refusals.not_owner(self._parts.node, self.key, self._evicted) if self._evicted else None

    def _setback(self) -> RoostError | None:
        """Why its process was ended, if it was for what other turns or its files did not become."""
        if self._behind.failure:
            return refusals.built_on(self._behind.failure)
        return self._process.filler.failure

    def _told_instead(self, error: RoostError) -> RoostError | None:
        if error.reason is Reason.TURN_CANCELLED:
            return None
        if told := self._eviction() or self._setback():
            return told
        if self._process.filler.told_instead(error) is not error:
            return self._process.filler.told_instead(error)
        # A node that stood still sees deadlines pass that were nobody's fault: it must not judge by them.
        if self._parts.tenure.trusted(self._parts.clock()):
            return None
        return refusals.lost_touch(self._parts.node, error)

    def _may_leave(self) -> bool:
        """May what its agent sends leave this node? Asked for every piece."""
        return self._evicted is None and self._parts.tenure.trusted(self._parts.clock())

    def _check_owner(self) -> None:
        if eviction := self._eviction():
            raise eviction
