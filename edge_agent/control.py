"""The seam between a node and the control plane. Real: `edge_agent.link`; fake: tests/support."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from shared.identity import InstanceKey
from shared.policy import Policy, parse_policy


@dataclass(frozen=True, slots=True)
class Agent:
    """An agent version that this node may be asked to run."""

    version: str
    policy_toml: str
    bundle_root: str
    policy: Policy

    @classmethod
    def of(cls, version: str, policy_toml: str, bundle_root: str) -> Agent:
        """AGENT_INVALID if the policy is not one that this node understands."""
        return cls(version, policy_toml, bundle_root, parse_policy(policy_toml))


@dataclass(frozen=True, slots=True)
class CommittedState:
    """What the mesh has of an instance. Version 0: nothing yet."""

    version: int
    root: str
    agent: Agent


class ControlPlane(Protocol):
    """RoostError COORDINATOR_UNREACHABLE or STORE_UNAVAILABLE when there is no answer within `timeout`
    seconds; EPOCH_STALE when this node does not own the instance in this epoch."""

    async def fetch(self, key: InstanceKey, epoch: int, timeout: float) -> CommittedState: ...

    async def commit(
        self, key: InstanceKey, epoch: int, version: int, root: str, turn_id: str, timeout: float
    ) -> None:
        """Repeating a commit that was applied succeeds, so after a lost answer it is simply sent again."""
        ...

    async def hibernated(self, key: InstanceKey, epoch: int, timeout: float) -> None: ...
