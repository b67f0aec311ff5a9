"""Admin: for operators and developers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from blake3 import blake3

from coordinator.cache import Cache
from coordinator.records import (
    AgentRecord,
    InstanceRecord,
    NodeRecord,
    NodeState,
    Phase,
    Stored,
    agent_key,
    coordinator_key,
)
from coordinator.registry import Registry
from coordinator.store.base import Expect, Put, Store
from protos.v1 import admin_pb2, admin_pb2_grpc, common_pb2
from shared.content import is_hash
from shared.errors import Reason, RoostError
from shared.identity import NAME_RULE, is_name
from shared.policy import parse_policy


class AdminServicer(admin_pb2_grpc.AdminServicer):
    def __init__(self, store: Store, cache: Cache, registry: Registry) -> None:
        self._store = store
        self._cache = cache
        self._registry = registry

    async def Deploy(self, request: admin_pb2.DeployRequest, context: Any) -> admin_pb2.DeployReply:
        """What runs keeps its version until it hibernates or moves; whatever starts from now on is new."""
        agent = _checked_agent(request.agent)
        name = agent_key(agent.tenant, agent.name)
        while True:  # each turn means that somebody else deployed this agent; the call's deadline bounds it
            found = await self._store.get(name)
            if found is not None and AgentRecord.decode(found).value == agent:
                return admin_pb2.DeployReply(version=agent.version, changed=False)
            guard = Expect(name, found.revision if found else 0)
            result = await self._store.txn([guard], [Put(name, agent.encode())])
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
        return admin_pb2.StatusReply(
            nodes=[self._node(stored.value) for _, stored in nodes],
            instances=[_instance(stored.value) for _, stored in instances],
            agents=self._agents(""),
            coordinator=self._registry.me,
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

        await self._registry.change_node(request.node, drained)
        return admin_pb2.DrainReply(instances=len(self._cache.instances_of(request.node)))

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


def _instance(record: InstanceRecord) -> admin_pb2.InstanceStatus:
    return admin_pb2.InstanceStatus(
        key=record.key.to_proto(),
        node=record.node,
        epoch=record.epoch,
        version=record.version,
        phase=record.phase.value,
        why=record.why,
        last_turn=record.last_turn,
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
