"""Values that several of these tests use."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, auto

from coordinator.cache import Cache
from coordinator.records import (
    AgentRecord,
    InstanceRecord,
    NodeInfo,
    NodeRecord,
    NodeState,
    Phase,
    Position,
    Role,
    Stored,
    agent_key,
    node_key,
)
from coordinator.store.base import Delete, Expect, Put, TxnResult
from coordinator.store.memory import MemoryStore
from shared.errors import Reason, RoostError
from shared.identity import InstanceKey
from shared.resources import Resources

KEY = InstanceKey("acme", "chef", "ana")


def instance(**changes: object) -> InstanceRecord:
    values: dict[str, object] = {
        "key": KEY,
        "epoch": 1,
        "node": "a",
        "version": 0,
        "root": "",
        "last_turn": "",
        "phase": Phase.PLACED,
        "why": "nearest",
        "agent_version": "v1",
        "placed_at_unix": 1e9,
    }
    return InstanceRecord(**{**values, **changes})  # type: ignore[arg-type]


def info(id: str, started_id: str = "s1", role: Role = Role.EDGE) -> NodeInfo:
    return NodeInfo(
        id, role, "lab", f"{id}:1", Position(1.5, -2.5), Resources(1 << 30, 4000, 100), started_id
    )


def node(
    id: str,
    coordinator: str = "me",
    state: NodeState = NodeState.UP,
    revision: int = 5,
    started_id: str = "s1",
) -> Stored[NodeRecord]:
    return Stored(NodeRecord(info(id, started_id), coordinator, state, False), revision)


class Fault(Enum):
    """What happens to a call on its way."""

    NONE = auto()
    REQUEST_LOST = auto()  # not applied, and no answer
    ANSWER_LOST = auto()  # applied, but no answer


class FlakyStore(MemoryStore):
    """Does to the calls that follow what `faults` says, first to last; then it is well."""

    def __init__(self) -> None:
        super().__init__()
        self.faults: list[Fault] = []
        self.transactions = 0

    async def get(self, key: str, timeout: float = 5.0) -> object:  # type: ignore[override]
        self._fault_before()
        return await super().get(key, timeout)

    async def txn(
        self, guards: Sequence[Expect], writes: Sequence[Put | Delete], timeout: float = 5.0
    ) -> TxnResult:
        fault = self._fault_before()
        self.transactions += 1
        result = await super().txn(guards, writes, timeout)
        if fault is Fault.ANSWER_LOST:
            raise unavailable()
        return result

    def _fault_before(self) -> Fault:
        fault = self.faults.pop(0) if self.faults else Fault.NONE
        if fault is Fault.REQUEST_LOST:
            raise unavailable()
        return fault


def unavailable() -> RoostError:
    return RoostError(Reason.STORE_UNAVAILABLE, "no answer", "wait")


async def mesh_in(store: MemoryStore, nodes: str) -> Cache:
    """Writes into `store` the agent of KEY and a node that is up for each letter of `nodes`."""
    for name in nodes:
        record = NodeRecord(info(name), "me", NodeState.UP, False)
        await store.txn([], [Put(node_key(name), record.encode())])
    agent = AgentRecord("acme", "chef", "v1", '[agent]\nname = "chef"\n[run]\nentry = "a:b"\n', "ab" * 32)
    await store.txn([], [Put(agent_key("acme", "chef"), agent.encode())])
    cache = Cache(store)
    for table in (cache.nodes, cache.agents):
        await table.refresh()
    return cache


class NoCache:
    def instance(self, key: InstanceKey) -> None: ...

    def learn_instance(self, stored: Stored[InstanceRecord]) -> None: ...


class OldCache:
    """Remembers what it first learned of a revision, and gives whichever is asked for: as stale as can be."""

    def __init__(self) -> None:
        self.seen: list[Stored[InstanceRecord]] = []
        self.lag = 0

    def instance(self, key: InstanceKey) -> Stored[InstanceRecord] | None:
        mine = [s for s in self.seen if s.value.key == key]
        return mine[max(-len(mine), -1 - self.lag)] if mine else None

    def learn_instance(self, stored: Stored[InstanceRecord]) -> None:
        self.seen.append(stored)
