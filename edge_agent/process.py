"""The process of one instance: how it comes to be, goes on under another daemon, changes its size, and ends.

Always true: before an agent runs, the files in its jail are just the committed version, and its room is
reserved; a start that fails leaves no process, no way out of a jail and no directory that was not there. At
most one jail is held at a time.

How it can fail: there is no room (NODE_FULL), the agent can't be brought here or does not start, the files
can't be put back (RESTORE_INCOMPLETE), or it is lost meanwhile (what `check_owner` raises).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

from edge_agent.control import Agent, CommittedState
from edge_agent.filler import Filler
from edge_agent.freezer import Freezer
from edge_agent.jail.api import Jail, JailGone
from edge_agent.packages import Tell
from edge_agent.phases import Live, Parts
from edge_agent.records import NodeRecord
from edge_agent.speakers import speaker_of
from edge_agent.specs import of_instance
from edge_agent.starts import Exec, FromZygote, Parked, Way, is_agents_fault, name_of
from edge_agent.state.index import Index
from edge_agent.state.snapshot import Snapshot, size_on_disk
from edge_agent.state.store import FEW_FILES
from protos.v1 import common_pb2
from shared.errors import Reason, RoostError
from shared.failpoints import failpoint
from shared.identity import InstanceKey
from shared.manifest import FileNode, StateManifest
from shared.resources import Resources
from shared.units import format_size

log = logging.getLogger(__name__)


class Process:
    """`may_leave`: may what its agent sends leave this node? `check_owner` raises if it may not run here."""

    def __init__(
        self,
        key: InstanceKey,
        epoch: int,
        jail_id: str,
        parts: Parts,
        may_leave: Callable[[], bool],
        check_owner: Callable[[], None],
    ) -> None:
        self.jail_id = jail_id  # where its files are, or will be
        self.jail: Jail | None = None  # also on the way to being started
        self.freezer = Freezer()
        self.filler = Filler(key)
        self._key = key
        self._epoch = epoch
        self._parts = parts
        self._may_leave = may_leave
        self._check_owner = check_owner
        self._started = False
        self._touched = False  # its files, since what was last captured or put back
        self._resizing = asyncio.Lock()

    async def start(self, committed: CommittedState, manifest: StateManifest, tell: Tell) -> Live:
        """`tell` is told what takes long."""
        agent, parts = committed.agent, self._parts
        _check_disk(agent, manifest)
        parts.reservations.claim(self._key, self._epoch, committed.need, parts.clock())
        if not parts.state.bundles.has(agent.version):
            tell("bringing the agent's files to this node")
        await parts.state.bundles.ensure(agent.version, agent.bundle_root)
        packages = await parts.packages.ensure(agent, tell)
        known = parts.records.get(self.jail_id)
        lay = await asyncio.to_thread(_index_of, known) if known else None
        # What is light is sooner written into a jail that waits than a jail is made around the files here.
        is_new_here = known is None or parts.state.is_light(manifest)
        for way in parts.starts.ways(agent, packages, is_new_here):
            began = parts.clock()
            try:
                index = await self._start_by(way, committed, packages, manifest, lay)
            except (RoostError, JailGone) as error:
                if isinstance(way, Exec) or is_agents_fault(error):
                    raise
                log.warning("%s can't be started by %s: %s", self._key, name_of(way), error)
                if known:
                    parts.records.put(known)
                continue
            log.info("%s: %s, %.1f ms", self._key, name_of(way), (parts.clock() - began) * 1000)
            break
        if known and known.jail_id != self.jail_id:
            parts.starts.discard(known.jail_id)
        if committed.version == 0:
            resumed_from = common_pb2.NEW
        elif known and lay and known.version == committed.version:
            resumed_from = common_pb2.DISK
        else:
            resumed_from = common_pb2.BLOBS
        failpoint("node.start.started")
        assert self.jail is not None
        self._started = True
        return Live(self.jail, agent, manifest, index, resumed_from, committed.root)

    async def _start_by(
        self, way: Way, committed: CommittedState, packages: str, manifest: StateManifest, lay: Index | None
    ) -> Index:
        """Leaves the running agent's jail in `jail`, or nothing behind."""
        parts, run, network = self._parts, committed.agent.policy.run, committed.agent.policy.network
        own_id = self.jail_id
        jail = way.jail if isinstance(way, Parked) else await self._make(committed, packages, way)
        self.jail = jail
        try:
            self.jail_id = jail.jail_id
            self.freezer.attach(jail)
            if jail.limits != committed.need:  # it was parked, at the size that most have
                await jail.resize(committed.need)
            failpoint("node.start.before_restore")
            if isinstance(way, Parked) and committed.version == 0:
                index = parts.state.nothing()
            else:
                guard = jail if self.filler.may else None
                state = parts.state.beside(committed.inline)
                index, filling = await state.restore(jail.files, manifest, lay, guard)
                self.filler.begin(filling, jail)
            failpoint("node.start.restored")
            self._touched = False
            await self.record(committed.agent, manifest, committed.root, index)
            self._check_owner()
            if not isinstance(way, Parked):
                await parts.egress.prepare(jail, network)
            parts.egress.open(jail, self._key, network, self._may_leave)
            if not isinstance(way, Parked):
                await jail.start()
                await speaker_of(run).ready(jail, run.start_timeout)
        except BaseException as error:
            self.jail = None
            self.freezer.detach()
            parts.egress.close(jail.jail_id)
            told = self.filler.told_instead(error) if isinstance(error, RoostError) else error
            await jail.kill()
            await self.filler.end()
            if isinstance(way, Parked):
                self.jail_id = own_id
                parts.records.delete(jail.jail_id)
                with suppress(RoostError):  # then the next start of the node removes it
                    await parts.jails.discard(jail.jail_id)
            raise told from error.__cause__
        return index

    async def _make(self, committed: CommittedState, packages: str, way: Way) -> Jail:
        zygote = way.jail_id if isinstance(way, FromZygote) else ""
        return await self._parts.jails.make(
            of_instance(self.jail_id, committed.agent, committed.need, packages, zygote)
        )

    async def adopt(self, jail: Jail, record: NodeRecord) -> Live:
        """Goes on with a jail that an earlier daemon of this node started and left between turns.

        No need to ask what is committed: only this node can have committed in this epoch, and it was not
        at it. If the epoch is over, the coordinator says so when the node registers.
        """
        parts, network = self._parts, record.agent.policy.network
        manifest = await parts.state.load(self._key, record.version, record.root)
        await parts.egress.prepare(jail, network)
        parts.egress.open(jail, self._key, network, self._may_leave)
        parts.reservations.claim(self._key, self._epoch, jail.limits, parts.clock())
        self.jail = jail
        self.freezer.adopt(jail)
        self._started = True
        return Live(jail, record.agent, manifest, _index_of(record), common_pb2.LIVE, record.root)

    def turn_begins(self) -> None:
        """From here on its files may be anything."""
        self._touched = True
        self._parts.records.set_busy(self.jail_id)

    async def capture(self, live: Live) -> Snapshot:
        """Its files as they are now. JailGone if it has ended."""
        while True:
            await self.filler.served()
            try:
                captured = await self._capture(live)
            except RoostError as error:
                if (
                    error.reason is not Reason.JAIL_FAILED
                    or not self.filler.waited_for
                    or self.filler.failure
                ):
                    raise
                continue  # somebody opened another file just then, and so did not stop
            self._touched = False
            return captured

    async def _capture(self, live: Live) -> Snapshot:
        async with self.freezer.frozen("capture"), self.filler.quiet() as filling:
            most = live.agent.policy.disk.state_bytes
            return await self._parts.state.capture(live.jail.files, live.index, most, filling)

    async def record(self, agent: Agent, manifest: StateManifest, root: str, index: Index) -> None:
        """Writes down that its files are just this committed version; or not, if a turn has begun since or
        some are not there yet."""
        text = index.to_json() if len(index.files) < FEW_FILES else await asyncio.to_thread(index.to_json)
        busy = self._touched or self.filler.unfinished
        self._parts.records.put(
            NodeRecord(self.jail_id, self._key, self._epoch, manifest.version, root, agent, busy, text)
        )

    async def resize(self, need: Resources) -> bool:
        """Gives what runs this size, in the middle of a turn if need be. False: nothing runs. NODE_FULL or
        JAIL_FAILED if it can't be, and then all is as it was."""
        async with self._resizing:
            return await self._resize(need)

    async def _resize(self, need: Resources) -> bool:
        jail = self.jail
        if jail is None or not self._started:
            return False

        def claim(size: Resources) -> None:
            if self.jail is jail:  # else it has gone to sleep meanwhile, and its room is free
                self._parts.reservations.claim(self._key, self._epoch, size, self._parts.clock())

        before = jail.limits
        claim(need.with_at_least(before))
        now = before
        try:
            await jail.resize(need)
            now = need
        except JailGone:
            return False
        finally:
            claim(now)
        log.info("%s has %s now; before: %s", self._key, need, before)
        return True

    async def kill(self) -> None:
        """At once, in the middle of whatever. Whoever works with it finds it gone; `end` follows."""
        self._parts.egress.close(self.jail_id)
        if self.jail is not None:
            await self.jail.kill()

    async def end(self) -> None:
        """Ends it, if it was started, and gives its room back."""
        jail = self.jail
        try:
            if jail is not None and self._started:
                self.jail, self._started = None, False
                self.freezer.detach()
                self._parts.egress.close(self.jail_id)
                await jail.kill()
                await self.filler.end()
        finally:
            self._parts.reservations.release(self._key, self._epoch)


def _check_disk(agent: Agent, manifest: StateManifest) -> None:
    """A version of the agent that may have less than was committed would find no room for it."""
    taken = sum(size_on_disk(node.size if isinstance(node, FileNode) else 0) for node in manifest.nodes)
    if taken > agent.policy.disk.state_bytes:
        raise RoostError(
            Reason.STATE_TOO_LARGE,
            f"the instance's state takes {format_size(taken)}, and this version of its agent may have "
            f"{format_size(agent.policy.disk.state_bytes)}; its state is as it was",
            "deploy it with more resources.disk in agent.toml",
        )


def _index_of(record: NodeRecord | None) -> Index | None:
    return Index.from_json(record.index) if record is not None and record.index else None
