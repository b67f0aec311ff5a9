"""Admin: for operators and developers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from blake3 import blake3

from coordinator.cache import Cache
from coordinator.collecting.rounds import Fence
from coordinator.journal import Journals
from coordinator.mover import Mover
from coordinator.moves import TURN, Moved, Moves, Wish
from coordinator.records import (
    AgentRecord,
    InstanceRecord,
    NodeRecord,
    NodeState,
    Phase,
    Stored,
    agent_key,
    coordinator_key,
    node_key,
)
from coordinator.registry import Registry
from coordinator.resolving import Resolving
from coordinator.store.base import Expect, Put, Store
from coordinator.timers import InstanceTimers
from protos.v1 import admin_pb2, admin_pb2_grpc, common_pb2, timers_pb2
from shared.content import is_hash
from shared.effects import Call
from shared.errors import Reason, RoostError
from shared.identity import InstanceKey
from shared.names import NAME_RULE, is_name
from shared.policy import check_size, parse_policy
from shared.resources import Resources


class AdminServicer(admin_pb2_grpc.AdminServicer):
    def __init__(
        self,
        store: Store,
        cache: Cache,
        registry: Registry,
        resolving: Resolving,
        moves: Moves,
        mover: Mover,
        journals: Journals,
        fence: Fence,
    ) -> None:
        self._fence = fence
        self._resolving = resolving
        self._moves = moves
        self._mover = mover
        self._store = store
        self._cache = cache
        self._registry = registry
        self._journals = journals

    async def Deploy(self, request: admin_pb2.DeployRequest, context: Any) -> admin_pb2.DeployReply:
        """What runs keeps its version until it hibernates or moves; whatever starts from now on is new."""
        agent = _checked_agent(request.agent)
        name = agent_key(agent.tenant, agent.name)
        while True:  # each turn means that somebody else deployed this agent; the call's deadline bounds it
            found = await self._store.get(name)
            fence = await self._fence.guard(request.gc_round, fresh=True)
            if found is not None and AgentRecord.decode(found).value == agent:
                return admin_pb2.DeployReply(version=agent.version, changed=False)
            guard = Expect(name, found.revision if found else 0)
            result = await self._store.txn([guard, *fence], [Put(name, agent.encode())])
            if result.succeeded:
                self._cache.agents.learn(name, Stored(agent, result.revision))
                return admin_pb2.DeployReply(version=agent.version, changed=True)

    async def ListAgents(
        self, request: admin_pb2.ListAgentsRequest, context: Any
    ) -> admin_pb2.ListAgentsReply:
        if request.tenant and not is_name(request.tenant):
            raise RoostError(Reason.BAD_REQUEST, f"{request.tenant!r} is no tenant name", NAME_RULE)
        return admin_pb2.ListAgentsReply(agents=self._agents(request.tenant))

    async def Status(self, request: admin_pb2.StatusRequest, context: Any) -> admin_pb2.StatusReply:
        nodes = sorted(self._cache.nodes.records.items())
        instances = sorted(self._cache.instances.records.items())
        last = self._cache.collection
        return admin_pb2.StatusReply(
            nodes=[self._node(stored.value) for _, stored in nodes],
            instances=[_instance(s.value, self._cache.timers_of(s.value.key)) for _, s in instances],
            agents=self._agents(""),
            coordinator=self._registry.me,
            collection=last.to_proto() if last else None,
        )

    async def Drain(self, request: admin_pb2.DrainRequest, context: Any) -> admin_pb2.DrainReply:
        def drained(node: NodeRecord | None) -> NodeRecord:
            if node is None:
                raise RoostError(
                    Reason.NODE_UNKNOWN,
                    f"no node {request.node} has ever registered",
                    "`roost nodes` lists those that have",
                )
            return replace(node, draining=not request.undo)

        found = await self._store.get(node_key(request.node))
        if found is None or NodeRecord.decode(found).value.draining is request.undo:
            await self._registry.change_node(request.node, drained)  # else it is only asked how far it is
        owned = self._cache.instances_of(request.node).values()
        return admin_pb2.DrainReply(
            instances=len(owned),
            live=sum(1 for record in owned if record.phase is not Phase.HIBERNATED),
            waiting=self._mover.trouble(request.node),
        )

    async def Resize(self, request: admin_pb2.ResizeRequest, context: Any) -> admin_pb2.ResizeReply:
        wanted = Resources.from_proto(request.size)

        def size_from(present: Resources) -> Resources | None:
            if request.reset:
                return None
            size = Resources(
                wanted.memory_bytes or present.memory_bytes,
                wanted.cpu_millis or present.cpu_millis,
                wanted.pids or present.pids,
            )
            check_size(size)
            return size

        record, need = await self._resolving.resize(InstanceKey.from_proto(request.key), size_from)
        return admin_pb2.ResizeReply(
            size=need.to_proto(), node=record.node, running=record.phase is not Phase.HIBERNATED
        )

    async def Effects(self, request: admin_pb2.EffectsRequest, context: Any) -> admin_pb2.EffectsReply:
        journals = await self._journals.unfinished(InstanceKey.from_proto(request.key))
        return admin_pb2.EffectsReply(
            turns=[
                admin_pb2.Journal(turn_id=journal.turn_id, calls=[call.to_proto() for call in journal.calls])
                for journal in journals
            ]
        )

    async def Settle(self, request: admin_pb2.SettleRequest, context: Any) -> admin_pb2.SettleReply:
        await self._journals.settle(
            InstanceKey.from_proto(request.key),
            request.turn_id,
            Call.from_proto(request.call),
            request.done,
            request.result,
        )
        return admin_pb2.SettleReply()

    async def Move(
        self, request: admin_pb2.MoveRequest, context: Any
    ) -> AsyncIterator[admin_pb2.MoveProgress]:
        wish = Wish(
            InstanceKey.from_proto(request.key),
            request.node or None,
            "an operator moved it",
            home=True,
            turn=request.turn_ms / 1000 or TURN,
            now=request.now,
        )
        told: asyncio.Queue[str | None] = asyncio.Queue()
        task = self._moves.begin(wish, told.put_nowait)
        task.add_done_callback(lambda _: told.put_nowait(None))
        while (text := await told.get()) is not None:
            yield admin_pb2.MoveProgress(doing=text)
        yield admin_pb2.MoveProgress(moved=_moved(await task))

    def _agents(self, tenant: str) -> list[common_pb2.AgentSpec]:
        records = sorted(self._cache.agents.records.items())
        return [s.value.to_proto() for _, s in records if tenant in ("", s.value.tenant)]

    def _node(self, node: NodeRecord) -> admin_pb2.NodeStatus:
        link = self._registry.links.get(node.info.id)
        owned = self._cache.instances_of(node.info.id).values()
        return admin_pb2.NodeStatus(
            node=node.info.to_proto(),
            state=self._state(node),
            reserved=self._cache.reserved(node.info.id).to_proto(),
            instances=sum(1 for record in owned if record.phase is not Phase.HIBERNATED),
            load=link.load if link else -1.0,
            rtt_ms=link.rtt_ms if link else -1.0,
            peers=link.peers if link else (),
            coordinator=node.coordinator,
        )

    def _state(self, node: NodeRecord) -> str:
        if node.state is NodeState.LOST:
            return "lost"
        if node.coordinator == self._registry.me:
            link = self._registry.links.get(node.info.id)
            heard = link is not None and self._registry.is_fresh(link.silence)
        else:
            heard = coordinator_key(node.coordinator) in self._cache.coordinators.records
        if not heard:
            return "suspect"
        return "draining" if node.draining else "up"


def _moved(moved: Moved) -> admin_pb2.Moved:
    return admin_pb2.Moved(
        source=moved.source,
        target=moved.record.node,
        epoch=moved.record.epoch,
        version=moved.record.version,
        live=moved.live,
        pause_ms=moved.pause * 1000,
        prefetched_bytes=moved.prefetched,
        trouble=moved.trouble,
    )


def _instance(record: InstanceRecord, timers: Stored[InstanceTimers] | None) -> admin_pb2.InstanceStatus:
    return admin_pb2.InstanceStatus(
        key=record.key.to_proto(),
        node=record.node,
        epoch=record.epoch,
        version=record.version,
        phase=record.phase.value,
        why=record.why,
        last_turn=record.last_turn,
        size=record.size.to_proto() if record.size else None,
        parked=record.parked,
        timers=[
            timers_pb2.TimerStatus(
                name=timer.name,
                due_unix=timer.due,
                attempts=timer.attempts,
                next_unix=0.0 if timer.failed else timer.next,
                error=timer.error,
                failed=timer.failed,
            )
            for timer in (timers.value.timers if timers else ())
        ],
    )


def _checked_agent(spec: common_pb2.AgentSpec) -> AgentRecord:
    for what, name in (("tenant", spec.tenant), ("agent", spec.name)):
        if not is_name(name):
            raise RoostError(Reason.AGENT_INVALID, f"{name!r} is no {what} name", NAME_RULE)
    policy = parse_policy(spec.policy_toml)
    if policy.agent.name != spec.name:
        raise RoostError(
            Reason.AGENT_INVALID,
            f"agent.toml names the agent {policy.agent.name}, but it is deployed as {spec.name}",
            "deploy it under the name in its agent.toml",
        )
    if not is_hash(spec.bundle_root):
        raise RoostError(
            Reason.AGENT_INVALID,
            f"{spec.bundle_root!r} is no hash of a bundle's manifest",
            "put the files in the blob store first; 64 hex digits name them",
        )
    version = blake3(f"{spec.bundle_root}\n{spec.policy_toml}".encode()).hexdigest()
    if spec.version not in ("", version):
        raise RoostError(
            Reason.AGENT_INVALID,
            f"version {spec.version!r} is not the hash of this policy and these files",
            "leave it empty: the coordinator computes it",
        )
    return AgentRecord(spec.tenant, spec.name, version, spec.policy_toml, spec.bundle_root)
