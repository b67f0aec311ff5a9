"""All instances of this node: who may attach, who must go, who may sleep.

Always true: one Instance object a key at a time, of the highest epoch that was seen here; an older one is
gone, files and all, before a newer one begins. While the node's tenure is not trusted every jail is frozen
and no turn is accepted.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress

from edge_agent.instance import Instance
from edge_agent.jail.api import Jail
from edge_agent.moving import Moving
from edge_agent.phases import Live, Parts
from edge_agent.pressure import Idle
from edge_agent.records import NodeRecord
from edge_agent.turns import Turn
from edge_agent.under_way import UnderWay
from protos.v1 import common_pb2, link_pb2
from shared.errors import Reason, RoostError
from shared.identity import InstanceKey, Ticket
from shared.resources import Resources

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
        self._turns: set[asyncio.Task[None]] = set()
        self._under_way: dict[tuple[Instance, str], UnderWay] = {}  # by the turn's id
        self._discards: set[asyncio.Task[None]] = set()
        self._stopping = False
        self._moving = Moving(parts, self._instance, self.reserve)

    # --- for Attach --------------------------------------------------------------------------

    @asynccontextmanager
    async def attached(self, ticket: Ticket) -> AsyncIterator[Instance]:
        """The ticket's instance, kept in place while the block lasts. EPOCH_STALE if a newer one is known."""
        async with self._kept(ticket.key, ticket.epoch) as instance:
            yield instance

    @asynccontextmanager
    async def _kept(self, key: InstanceKey, epoch: int) -> AsyncIterator[Instance]:
        self.check_serving()
        instance = await self._instance(key, epoch)
        instance.attached += 1
        try:
            yield instance
        finally:
            instance.attached -= 1

    def begin(self, instance: Instance, turn: Turn, patience: float = math.inf) -> UnderWay:
        """Starts a turn that goes on even if its client leaves, or joins the one of this id that is under
        way. `patience`: seconds from now that the client will wait."""
        self.check_serving()
        name = (instance, turn.id)
        known = self._under_way.get(name)
        if known is not None and known.join(patience):
            return known
        asked = self._under_way[name] = UnderWay(turn, patience)
        task = asyncio.create_task(self._turn(instance, asked), name=f"turn {instance.key}")
        self._turns.add(task)
        task.add_done_callback(self._turns.discard)
        return asked

    async def _turn(self, instance: Instance, asked: UnderWay) -> None:
        try:
            asked.end(await instance.turn(asked))
        except RoostError as error:
            asked.end(error)
        except asyncio.CancelledError:
            asked.end(_stopped(self._info.id))
            raise
        except Exception as error:
            log.exception("a turn of %s failed by a bug", instance.key)
            asked.end(RoostError(Reason.INTERNAL, f"node {self._info.id} failed; its log says how: {error}"))
        finally:
            if self._under_way.get((instance, asked.turn.id)) is asked:
                del self._under_way[instance, asked.turn.id]

    async def finish_turns(self, timeout: float) -> None:
        """Accepts no more turns, and waits for those under way, and for commits behind them."""
        self._stopping = True
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                if self._turns:
                    await asyncio.wait(self._turns)
                await self._each(Instance.settled)
        for task in self._turns:
            task.cancel()
        await self._each(Instance.stop)

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

    def reserve(self, key: InstanceKey, epoch: int, need: Resources, hold: float) -> None:
        self.check_serving()
        self._parts.reservations.reserve(key, epoch, need, self._parts.clock(), hold)

    async def resize(self, key: InstanceKey, epoch: int, need: Resources, hold: float) -> None:
        self.check_serving()
        instance = self._instances.get(key)
        if instance is None or instance.epoch != epoch or not await instance.resize(need):
            self.reserve(key, epoch, need, hold)

    async def wake(self, key: InstanceKey, epoch: int, turn_id: str, message: str, timer: str) -> None:
        """Runs a turn that a timer starts, with nobody to hear it. Returns when it is committed. Asked again
        meanwhile, by a coordinator that can't know of it, it is still the same turn."""
        async with self._kept(key, epoch) as instance:
            done = await self.begin(instance, Turn(turn_id, key.user, message, timer)).outcome()
            if not done.receipt.durable:
                await instance.settled()
        log.info("%s: timer %s ran, version %d", key, timer, done.receipt.version)

    async def move(self, step: link_pb2.MoveStep) -> link_pb2.MoveStepReply:
        self.check_serving()
        return await self._moving.step(step)

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

    async def salvage(self, hashes: Sequence[str]) -> None:
        if count := await self._parts.state.salvage(hashes):
            log.info("put %d blobs that were missing or damaged into the blob store", count)

    async def _remove(self, instance: Instance, why: str) -> None:
        # What waits behind it may only go on when the eviction is known, which it is before the next await.
        self._moving.open(instance.key)
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
        directories = await self._parts.jails.directories()
        known = {held.jail_id for held in self._parts.records.held()}
        known |= self._parts.packages.recover(directories)
        for jail_id in directories:
            if jail_id not in known:
                try:
                    await self._parts.jails.discard(jail_id)
                except RoostError:
                    self._parts.starts.left_behind(jail_id)

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
                self._parts.egress.cut(instance.jail_id)
                await instance.suspend(_SUSPENDED)

        await self._each(one)

    def idle(self) -> list[Idle]:
        """Those that run, and are not in the middle of a turn."""
        return [
            Idle(key, instance.idle_since)
            for key, instance in self._instances.items()
            if isinstance(instance.state, Live) and not instance.busy
        ]

    async def hibernate(self, keys: Sequence[InstanceKey], least_idle: float) -> list[InstanceKey]:
        """Implements `edge_agent.relief.Sleepers`. The coordinator hears of it from `tidy`."""
        now = self._parts.clock()
        gone: list[InstanceKey] = []

        async def one(instance: Instance) -> None:
            if instance.key in wanted:
                async with self._changing.setdefault(instance.key, asyncio.Lock()):
                    if await instance.hibernate_if_idle(now, least_idle):
                        gone.append(instance.key)

        wanted = set(keys)
        await self._each(one)
        return gone

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
        self._parts.egress.prune()
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


def _stopped(node: str) -> RoostError:
    return RoostError(
        Reason.TURN_NOT_COMMITTED,
        f"node {node} stopped before the turn was certainly committed",
        "send it again under the same id: it is applied once",
    )


def _stale(key: InstanceKey, epoch: int, newer: int) -> RoostError:
    return RoostError(
        Reason.EPOCH_STALE,
        f"epoch {epoch} of {key} is over: epoch {newer} is known here",
        "resolve again",
    )
