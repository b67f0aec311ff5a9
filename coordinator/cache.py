"""What this coordinator believes the store holds: fast to read, perhaps a little stale.

Each table is listed at a revision R, watched from R+1, and listed again from time to time, after a
compaction, and when a deletion is heard of (etcd can lose one, and one alone proves nothing). Records merge
by revision, so the order in which a list, a watch and this coordinator's own writes arrive is of no matter.
Nothing that promise 1 rests on may be decided here: transactions compare revisions.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import aclosing, suppress
from typing import Any, Generic, NoReturn, TypeVar, cast

from coordinator.collecting.report import Report
from coordinator.collecting.rounds import LAST, ROUND, Round
from coordinator.quotas import QUOTAS, Quota, Used, check, quota_key
from coordinator.records import (
    AGENTS,
    COORDINATORS,
    INSTANCES,
    NODES,
    AgentRecord,
    CoordinatorRecord,
    InstanceRecord,
    NodeRecord,
    Phase,
    Stored,
    agent_key,
    instance_key,
    node_key,
)
from coordinator.store.base import Change, Compacted, Record, Store
from coordinator.timers import TIMERS, InstanceTimers, timers_key
from shared.errors import RoostError
from shared.identity import InstanceKey
from shared.lifecycle import Services
from shared.reconcile import ReconcileLoop
from shared.resources import Resources

log = logging.getLogger(__name__)

T = TypeVar("T")
OnChange = Callable[[Stored[T] | None, Stored[T] | None], None]

_PAUSE = 0.5  # seconds before a watch or a first list that failed is tried again


class Table(Generic[T]):
    """The records under one prefix."""

    def __init__(
        self,
        store: Store,
        prefix: str,
        decode: Callable[[Record], Stored[T]],
        list_every: float,
        on_change: OnChange[T] = lambda old, new: None,
    ) -> None:
        self.records: dict[str, Stored[T]] = {}
        self.listed = asyncio.Event()
        self.lister = ReconcileLoop(f"list {prefix}", self.refresh, list_every)
        self._store = store
        self._prefix = prefix
        self._decode = decode
        self._on_change = on_change
        self._revision = 0

    async def refresh(self) -> None:
        """Lists the store and makes the table say the same. STORE_UNAVAILABLE leaves it as it was."""
        listing = await self._store.list(self._prefix)
        for record in listing.records:
            self._take(record)
        present = {record.key for record in listing.records}
        for key in [k for k, held in self.records.items() if k not in present]:
            if self.records[key].revision <= listing.revision:
                self._on_change(self.records.pop(key), None)
        self._revision = max(self._revision, listing.revision)
        self.listed.set()

    async def ensure_listed(self, why: str) -> None:
        """Returns when the table has been listed; does not wait for the period if that fails at first."""
        while not self.listed.is_set():
            self.lister.wake(why)
            with suppress(TimeoutError):
                async with asyncio.timeout(_PAUSE):
                    await self.listed.wait()

    async def follow(self) -> NoReturn:
        """Watches; lists again whenever changes may have been missed."""
        await self.ensure_listed("not listed yet")
        while True:
            try:
                changes = self._store.watch(self._prefix, self._revision + 1)
                async with aclosing(cast("Any", changes)):
                    async for batch in changes:
                        for change in batch:
                            self._hear(change)
            except Compacted:
                self.listed.clear()
                await self.ensure_listed("the changes were compacted")
            except RoostError as error:
                log.warning("the watch of %s: %s; it is tried again", self._prefix, error.message)
                await asyncio.sleep(_PAUSE)

    def learn(self, key: str, new: Stored[T]) -> None:
        """Takes a record that this coordinator read or wrote itself."""
        old = self.records.get(key)
        if old is None or new.revision > old.revision:
            self.records[key] = new
            self._on_change(old, new)

    def _hear(self, change: Change) -> None:
        self._revision = max(self._revision, change.revision)
        if change.record is None:
            self.lister.wake(f"{change.key} was deleted")
        else:
            self._take(change.record)

    def _take(self, record: Record) -> None:
        held = self.records.get(record.key)
        if held is not None and held.revision >= record.revision:
            return
        try:
            decoded = self._decode(record)
        except RoostError as error:
            log.warning("%s: %s", error.message, error.hint)
            return
        self.learn(record.key, decoded)


class Cache:
    """The tables, and what is computed from them."""

    def __init__(self, store: Store, list_every: float = 10.0) -> None:
        """`list_every` in seconds; instances, of which there are many, are listed a sixth as often."""
        self.nodes = Table(store, NODES, NodeRecord.decode, list_every)
        self.agents = Table(store, AGENTS, AgentRecord.decode, list_every, self._agent_changed)
        self.coordinators = Table(store, COORDINATORS, CoordinatorRecord.decode, list_every)
        self.instances = Table(
            store, INSTANCES, InstanceRecord.decode, list_every * 6, self._instance_changed
        )
        self.timers = Table(store, TIMERS, InstanceTimers.decode, list_every * 6)
        self.rounds = Table(store, ROUND, Round.decode, list_every)
        self.reports = Table(store, LAST, Report.decode, list_every * 6)
        self.quotas = Table(store, QUOTAS, Quota.decode, list_every)
        self.on_move: Callable[[InstanceRecord, InstanceRecord], None] = lambda old, new: None
        self._of_node: defaultdict[str, dict[InstanceKey, InstanceRecord]] = defaultdict(dict)
        self._reserved: dict[str, Resources] = {}
        self._used: defaultdict[str, Used] = defaultdict(Used)

    @property
    def _tables(self) -> tuple[Table[Any], ...]:
        return (
            self.nodes,
            self.agents,
            self.coordinators,
            self.instances,
            self.timers,
            self.rounds,
            self.reports,
            self.quotas,
        )

    def start(self, services: Services) -> None:
        for table in self._tables:
            services.start(table.lister.name, table.lister.run())
            services.start(table.lister.name.replace("list", "watch"), table.follow())

    async def wait_listed(self) -> None:
        """Returns when every table has been listed once."""
        for table in self._tables:
            await table.ensure_listed("not listed yet")

    def instance(self, key: InstanceKey) -> Stored[InstanceRecord] | None:
        return self.instances.records.get(instance_key(key))

    def learn_instance(self, stored: Stored[InstanceRecord]) -> None:
        self.instances.learn(instance_key(stored.value.key), stored)

    def round(self) -> Stored[Round] | None:
        return self.rounds.records.get(ROUND)

    def learn_round(self, stored: Stored[Round]) -> None:
        self.rounds.learn(ROUND, stored)

    @property
    def collection(self) -> Report | None:
        """The last one."""
        held = self.reports.records.get(LAST)
        return held.value if held else None

    @property
    def gc_round(self) -> int:
        """The round of collecting that has begun for certain; perhaps a later one, too."""
        known = self.round()
        return known.value.number if known else 0

    def agent(self, tenant: str, name: str) -> AgentRecord | None:
        held = self.agents.records.get(agent_key(tenant, name))
        return held.value if held else None

    def node(self, node: str) -> Stored[NodeRecord] | None:
        return self.nodes.records.get(node_key(node))

    def timers_of(self, key: InstanceKey) -> Stored[InstanceTimers] | None:
        return self.timers.records.get(timers_key(key))

    def quota(self, tenant: str) -> Quota:
        held = self.quotas.records.get(quota_key(tenant))
        return held.value if held else Quota(tenant)

    def used(self, tenant: str) -> Used:
        return self._used[tenant] if tenant in self._used else Used()

    def check_quota(self, key: InstanceKey, wants: int, is_new: bool = False) -> None:
        """May the instance have so many bytes? TENANT_QUOTA if that is more than it has, and too much."""
        held = self.instance(key)
        had = None if is_new else held.value.state_bytes if held else 0
        check(self.quota(key.tenant), self.used(key.tenant), had, wants)

    def instances_of(self, node: str) -> Mapping[InstanceKey, InstanceRecord]:
        """Those whose owner is `node`, in any phase."""
        return self._of_node.get(node, {})

    def reserved(self, node: str) -> Resources:
        """The sum of what the instances placed or live on `node` need."""
        known = self._reserved.get(node)
        if known is None:
            known = sum((self._need(r) for r in self.instances_of(node).values()), Resources())
            self._reserved[node] = known
        return known

    def _need(self, record: InstanceRecord) -> Resources:
        agent = self.agent(record.key.tenant, record.key.agent)
        if agent is None or record.phase is Phase.HIBERNATED:
            return Resources()
        return agent.need.sized(record.size)

    def _instance_changed(
        self, old: Stored[InstanceRecord] | None, new: Stored[InstanceRecord] | None
    ) -> None:
        for stored, sign in ((old, -1), (new, 1)):
            if stored is not None:
                tenant, used = stored.value.key.tenant, self._used[stored.value.key.tenant]
                state_bytes = used.state_bytes + sign * stored.value.state_bytes
                self._used[tenant] = Used(state_bytes, used.instances + sign)
        if old is not None:
            self._of_node[old.value.node].pop(old.value.key, None)
            self._count(old.value.node, Resources() - self._need(old.value))
        if new is not None:
            self._of_node[new.value.node][new.value.key] = new.value
            self._count(new.value.node, self._need(new.value))
        if old is not None and new is not None and old.value.epoch != new.value.epoch:
            self.on_move(old.value, new.value)

    def _count(self, node: str, change: Resources) -> None:
        """Keeps a known sum right. Summing anew at each placement would cost more the fuller a node is."""
        if node in self._reserved:
            self._reserved[node] += change

    def _agent_changed(self, old: Stored[AgentRecord] | None, new: Stored[AgentRecord] | None) -> None:
        self._reserved.clear()
