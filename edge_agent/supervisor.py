"""All instances of this node: who may attach, who must go, who may sleep.

Always true: one Instance object a key at a time, of the highest epoch that was seen here; an older one is
gone, files and all, before a newer one begins. While the node's tenure is not trusted every jail is frozen
and no turn is accepted.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

from edge_agent.control import Agent
from edge_agent.instance import Instance
from edge_agent.jail.api import Jail
from edge_agent.phases import Done, Live, Parts
from edge_agent.records import NodeRecord
from edge_agent.turns import Deltas, Turn
from protos.v1 import common_pb2, link_pb2
from shared.errors import Reason, RoostError
from shared.identity import InstanceKey, Ticket

log = logging.getLogger(__name__)

_SUSPENDED = "tenure"


def jail_id_of(key: InstanceKey) -> str:
    """The id for a jail of an instance that has none here yet. It may come to live in a parked one instead:
    its record says where."""
    return f"{key.agent[:24]}-{hashlib.sha256(str(key).encode()).hexdigest()[:24]}"


class Supervisor:
    """Implements `edge_agent.link.Node`."""

    def __init__(self, info: common_pb2.NodeInfo, parts: Parts, peers: Callable[[], list[str]]) -> None:
        self._info = info
        self._parts = parts
        self._tenure = parts.tenure
        self._peers = peers
        self._instances: dict[InstanceKey, Instance] = {}
        self._changing: dict[InstanceKey, asyncio.Lock] = {}
        self._turns: set[asyncio.Task[Done]] = set()
        self._discards: set[asyncio.Task[None]] = set()
        self._stopping = False

    # --- for Attach --------------------------------------------------------------------------

    @asynccontextmanager
    async def attached(self, ticket: Ticket) -> AsyncIterator[Instance]:
        """The ticket's instance, kept in place while the block lasts. EPOCH_STALE if a newer one is known."""
        self.check_serving()
        instance = await self._instance(ticket.key, ticket.epoch)
        instance.attached += 1
        try:
            yield instance
        finally:
            instance.attached -= 1

    def begin(self, instance: Instance, turn: Turn, deltas: Deltas) -> asyncio.Task[Done]:
        """Starts a turn that goes on even if its client leaves."""
        self.check_serving()
        task = asyncio.create_task(self._turn(instance, turn, deltas), name=f"turn {instance.key}")
        self._turns.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Done]) -> None:
        self._turns.discard(task)
        if not task.cancelled() and (error := task.exception()) and not isinstance(error, RoostError):
            log.error("%s failed by a bug", task.get_name(), exc_info=error)

    async def _turn(self, instance: Instance, turn: Turn, deltas: Deltas) -> Done:
        try:
            return await instance.turn(turn, deltas)
        finally:
            deltas.close()

    async def finish_turns(self, timeout: float) -> None:
        """Accepts no more turns, and waits for those under way."""
        self._stopping = True
        if self._turns:
            await asyncio.wait(self._turns, timeout=timeout)
        for task in self._turns:
            task.cancel()

    def check_serving(self) -> None:
        """NODE_STOPPING or NODE_SUSPENDED if no turns are taken now."""
        if self._stopping:
            raise RoostError(
                Reason.NODE_STOPPING, f"node {self._info.id} is stopping", "resolve again without this node"
            )
        if not self._tenure.trusted(self._parts.clock()):
            raise RoostError(
                Reason.NODE_SUSPENDED,
                f"node {self._info.id} has lost touch with its coordinator and takes no turns",
                "resolve again; the instance moves once the node's TTL has passed",
            )

    async def _instance(self, key: InstanceKey, epoch: int) -> Instance:
        async with self._changing.setdefault(key, asyncio.Lock()):
            known = self._instances.get(key)
            if known and known.epoch < epoch:
                # Won again after it was lost: what lies here may be another node's past.
                await self._remove(known, f"epoch {epoch} has begun")
                known = None
            if known is None:
                record = self._parts.records.of_key(key)
                if record and record.epoch > epoch:
                    raise _stale(key, epoch, record.epoch)
                jail_id = record.jail_id if record else jail_id_of(key)
                known = self._instances[key] = Instance(key, epoch, jail_id, self._parts)
            if known.epoch > epoch or known.evicted:
                raise _stale(key, epoch, known.epoch)
            return known

    # --- for the link ------------------------------------------------------------------------

    def info(self) -> common_pb2.NodeInfo:
        return self._info

    def held(self) -> list[link_pb2.Held]:
        held = {r.key: (r.epoch, r.version, False) for r in self._parts.records.held()}
        for key, instance in self._instances.items():
            if isinstance(instance.state, Live) and not instance.evicted:
                held[key] = (instance.epoch, instance.version, True)
        return [
            link_pb2.Held(key=key.to_proto(), epoch=epoch, version=version, live=live)
            for key, (epoch, version, live) in held.items()
        ]

    def heartbeat(self, seq: int) -> link_pb2.Heartbeat:
        return link_pb2.Heartbeat(
            seq=seq,
            peers=self._peers(),
            reserved=self._parts.reservations.total(self._parts.clock()).to_proto(),
            load=os.getloadavg()[0] / (os.cpu_count() or 1),
        )

    def reserve(self, key: InstanceKey, epoch: int, agent: Agent, hold: float) -> None:
        self.check_serving()
        self._parts.reservations.reserve(key, epoch, agent.policy.need, self._parts.clock(), hold)

    async def evict(self, key: InstanceKey, epoch: int, why: str) -> None:
        """Every epoch up to `epoch` is over."""
        async with self._changing.setdefault(key, asyncio.Lock()):
            instance = self._instances.get(key)
            if instance is not None:
                if instance.epoch <= epoch:
                    log.info("%s epoch %d ends here: %s", key, instance.epoch, why)
                    await self._remove(instance, why)
                return
            record = self._parts.records.of_key(key)
            if record and record.epoch <= epoch:
                self._parts.records.delete(record.jail_id)
                self._discard(record.jail_id)

    async def _remove(self, instance: Instance, why: str) -> None:
        await instance.evict(why)
        self._instances.pop(instance.key, None)
        self._discard(instance.jail_id)

    def _discard(self, jail_id: str) -> None:
        """In the background, for a large tree takes long. Should it fail, or come too late because the
        instance is here again, nothing is wrong: without a record the files count for nothing."""

        async def discard() -> None:
            try:
                await self._parts.jails.discard(jail_id)
            except RoostError as error:
                log.info("the files of jail %s stay for now: %s", jail_id, error.message)

        task = asyncio.create_task(discard(), name=f"discard {jail_id}")
        self._discards.add(task)
        task.add_done_callback(self._discards.discard)

    # --- background --------------------------------------------------------------------------

    async def adopt(self) -> None:
        """At the start: goes on with what an earlier daemon left, if it was between turns; ends the rest."""
        for jail in await self._parts.jails.adopt():
            record = self._parts.records.get(jail.jail_id)
            if record is None or record.busy or not await self._adopt(record, jail):
                log.info("jail %s was left in the middle of something: ended", jail.jail_id)
                await jail.kill()
        known = {held.jail_id for held in self._parts.records.held()}
        for jail_id in await self._parts.jails.directories():
            if jail_id not in known:
                with suppress(RoostError):  # a zygote's uid may still own the namespaces of its instances
                    await self._parts.jails.discard(jail_id)

    async def _adopt(self, record: NodeRecord, jail: Jail) -> bool:
        instance = Instance(record.key, record.epoch, record.jail_id, self._parts)
        try:
            await instance.adopt(jail, record)
        except RoostError as error:
            log.info("jail %s can't be gone on with: %s", jail.jail_id, error.message)
            return False
        self._instances[record.key] = instance
        return True

    async def suspend_or_resume(self) -> None:
        """One pass: what must be frozen is frozen, what need not be is thawed."""
        trusted = self._tenure.trusted(self._parts.clock())

        async def one(instance: Instance) -> None:
            if trusted:
                await instance.freezer.drop(_SUSPENDED)
            else:
                await instance.freezer.hold(_SUSPENDED)

        await self._each(one)

    async def tidy(self) -> None:
        """One pass: the idle hibernate, the coordinator hears of it, and what is lost goes."""
        now = self._parts.clock()

        async def one(instance: Instance) -> None:
            async with self._changing.setdefault(instance.key, asyncio.Lock()):
                if instance.busy:
                    return
                if instance.evicted:
                    await self._remove(instance, instance.evicted)
                    return
                if await instance.hibernate_if_idle(now):
                    log.info("%s hibernates", instance.key)
                if self._tenure.trusted(now):
                    await instance.tell()

        await self._each(one)
        self._forget_sleepers()

    async def _each(self, do: Callable[[Instance], Awaitable[None]]) -> None:
        """Does it to every instance at once. One that fails holds up no other; the next pass tries again."""

        async def guarded(instance: Instance) -> None:
            try:
                await do(instance)
            except RoostError as error:
                log.info("%r: %s", instance, error.message)
            except Exception:
                log.exception("%r: a bug", instance)

        await asyncio.gather(*(guarded(instance) for instance in list(self._instances.values())))

    def _forget_sleepers(self) -> None:
        for key, instance in list(self._instances.items()):
            changing = self._changing.get(key)
            if instance.forgettable and not (changing and changing.locked()):
                del self._instances[key]
        for key in [
            k for k, lock in self._changing.items() if k not in self._instances and not lock.locked()
        ]:
            del self._changing[key]


def _stale(key: InstanceKey, epoch: int, newer: int) -> RoostError:
    return RoostError(
        Reason.EPOCH_STALE,
        f"epoch {epoch} of {key} is over: epoch {newer} is known here",
        "resolve again",
    )
