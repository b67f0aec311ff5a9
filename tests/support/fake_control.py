"""The control plane as one node sees it, in memory, with the coordinator's rules for commits."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace

from edge_agent.control import Agent, CommittedState
from shared.errors import Reason, RoostError
from shared.identity import InstanceKey

POLICY = '[agent]\nname = "probe"\n[run]\nentry = "probe:agent"\nturn_timeout = "1s"\nidle_timeout = "10s"\n'
AGENT = Agent.of("v1", POLICY, "0" * 64)


@dataclass(frozen=True, slots=True)
class Owned:
    epoch: int
    version: int = 0
    root: str = ""


@dataclass
class FakeControl:
    """`owned` is the truth that tests read and change. `lost_answers`: commits that are applied although the
    node hears nothing of it. `down`: nothing answers."""

    owned: dict[InstanceKey, Owned] = field(default_factory=dict)
    asleep: set[InstanceKey] = field(default_factory=set)
    commits: list[str] = field(default_factory=list)
    lost_answers: int = 0
    down: bool = False

    async def fetch(self, key: InstanceKey, epoch: int, timeout: float) -> CommittedState:
        owned = await self._check(key, epoch)
        self.asleep.discard(key)
        return CommittedState(owned.version, owned.root, AGENT)

    async def commit(
        self, key: InstanceKey, epoch: int, version: int, root: str, turn_id: str, timeout: float
    ) -> None:
        owned = await self._check(key, epoch)
        if (owned.version, owned.root) != (version, root):
            if owned.version + 1 != version:
                raise RoostError(Reason.EPOCH_STALE, f"version {owned.version} is committed")
            self.owned[key] = replace(owned, version=version, root=root)
            self.commits.append(turn_id)
        if self.lost_answers:
            self.lost_answers -= 1
            raise RoostError(Reason.COORDINATOR_UNREACHABLE, "the answer was lost")

    async def hibernated(self, key: InstanceKey, epoch: int, timeout: float) -> None:
        await self._check(key, epoch)
        self.asleep.add(key)

    async def _check(self, key: InstanceKey, epoch: int) -> Owned:
        await asyncio.sleep(0)
        if self.down:
            raise RoostError(Reason.COORDINATOR_UNREACHABLE, "no coordinator answers")
        owned = self.owned.get(key)
        if owned is None or owned.epoch != epoch:
            raise RoostError(Reason.EPOCH_STALE, f"epoch {epoch} of {key} is over")
        return owned
