"""The seam between a node and the control plane. Real: `edge_agent.link`; fake: tests/support."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from shared.content import Blob
from shared.effects import Call
from shared.identity import InstanceKey
from shared.policy import Policy, parse_policy
from shared.resources import Resources
from shared.timers import Setting


@dataclass(frozen=True, slots=True)
class Agent:
    """An agent version that this node may be asked to run."""

    version: str
    policy_toml: str
    bundle_root: str
    policy: Policy

    @classmethod
    def of(cls, version: str, policy_toml: str, bundle_root: str) -> Agent:
        """AGENT_INVALID if the policy is not one that this node understands. All instances of a version share
        it."""
        return _agent(version, policy_toml, bundle_root)


@lru_cache(maxsize=256)
def _agent(version: str, policy_toml: str, bundle_root: str) -> Agent:
    return Agent(version, policy_toml, bundle_root, parse_policy(policy_toml))


@dataclass(frozen=True, slots=True)
class CommittedState:
    """What the mesh has of an instance. Version 0: nothing yet. `inline`: what of it the blob store may not
    have yet."""

    version: int
    root: str
    agent: Agent
    size: Resources | None = None  # None: as the agent's policy says
    unfinished: tuple[str, ...] = ()  # ids of turns that have a journal and were not committed
    inline: tuple[Blob, ...] = ()

    @property
    def need(self) -> Resources:
        return self.agent.policy.need.sized(self.size)


@dataclass(frozen=True, slots=True)
class Beside:
    """What becomes true together with a turn's state, in the same transaction."""

    calls: int = 0  # of the turn's journal, which ends
    timers: tuple[Setting, ...] = ()  # that it sets
    cancelled: tuple[str, ...] = ()  # names of timers
    timer: str = ""  # the name of the one that started it, which ends


ALONE = Beside()


@dataclass(frozen=True, slots=True)
class Commit:
    """A version to be published. `state_bytes`: of all its files together. `inline`: blobs that become
    durable with it (`shared.inline`); all else that the root needs must be durable before, put or asked for
    when the blob store was collected in `gc_round` or later."""

    version: int
    root: str
    turn_id: str
    state_bytes: int = 0
    beside: Beside = ALONE
    inline: tuple[Blob, ...] = ()
    gc_round: int = 0


class ControlPlane(Protocol):
    """RoostError COORDINATOR_UNREACHABLE or STORE_UNAVAILABLE when there is no answer within `timeout`
    seconds; EPOCH_STALE when this node does not own the instance in this epoch. `gc_round`: of collecting in
    the blob store, that has begun for certain."""

    @property
    def gc_round(self) -> int: ...

    async def fetch(self, key: InstanceKey, epoch: int, timeout: float) -> CommittedState: ...

    async def commit(self, key: InstanceKey, epoch: int, commit: Commit, timeout: float) -> None:
        """TIMER_LIMIT or TENANT_QUOTA: it is not applied; nor is it for BLOBS_UNAVAILABLE: it takes no blobs
        along now, put them into the blob store instead; nor for UPLOAD_STALE: its `gc_round` was too long
        ago, put again what is missing. Repeating a commit that was applied succeeds, so after a lost answer
        it is simply sent again."""
        ...

    async def journal(
        self, key: InstanceKey, epoch: int, turn_id: str, write: Sequence[Call], timeout: float
    ) -> Sequence[Call]:
        """Makes calls of a turn durable, where each still has the revision that it says, and returns them as
        they are then; without any, all that were made durable before. Repeating what was applied succeeds.

        TURN_NOT_COMMITTED: something else was written meanwhile, so the turn has to be run again.
        """
        ...

    async def hibernated(self, key: InstanceKey, epoch: int, timeout: float) -> None: ...
