"""The control plane as one node sees it, in memory, with the coordinator's rules for commits."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from edge_agent.control import Agent, Commit, CommittedState
from shared.content import Blob
from shared.effects import Call
from shared.errors import Reason, RoostError
from shared.identity import InstanceKey
from shared.resources import Resources

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
    inline: dict[InstanceKey, tuple[Blob, ...]] = field(default_factory=dict)  # never flushed
    takes_inline: bool = True
    agent: Agent = AGENT
    size: Resources | None = None
    journals: dict[str, dict[int, Call]] = field(default_factory=dict)  # of turns, by id
    writes: int = 0  # into journals
    gc_round: int = 0
    stale: list[int] = field(default_factory=list)  # rounds of commits that were refused as begun too early

    async def fetch(self, key: InstanceKey, epoch: int, timeout: float) -> CommittedState:
        owned = await self._check(key, epoch)
        self.asleep.discard(key)
        return CommittedState(
            owned.version, owned.root, self.agent, self.size, tuple(self.journals), self.inline.get(key, ())
        )

    async def commit(self, key: InstanceKey, epoch: int, commit: Commit, timeout: float) -> None:
        owned = await self._check(key, epoch)
        if (owned.version, owned.root) != (commit.version, commit.root):
            if commit.gc_round < self.gc_round - 1:
                self.stale.append(commit.gc_round)
                raise RoostError(Reason.UPLOAD_STALE, "another round has begun")
            if owned.version + 1 != commit.version:
                raise RoostError(Reason.EPOCH_STALE, f"version {owned.version} is committed")
            if commit.inline and not self.takes_inline:
                raise RoostError(Reason.BLOBS_UNAVAILABLE, "too much waits for the blob store")
            self.owned[key] = replace(owned, version=commit.version, root=commit.root)
            self.inline[key] = (*self.inline.get(key, ()), *commit.inline)
            self.commits.append(commit.turn_id)
            journal = self.journals.pop(commit.turn_id, {})
            assert all(number < commit.beside.calls for number in journal), "a journal outlives its turn"
        if self.lost_answers:
            self.lost_answers -= 1
            raise RoostError(Reason.COORDINATOR_UNREACHABLE, "the answer was lost")

    async def journal(
        self, key: InstanceKey, epoch: int, turn_id: str, write: Sequence[Call], timeout: float
    ) -> Sequence[Call]:
        await self._check(key, epoch)
        journal = self.journals.get(turn_id, {})
        if not write:
            return [call for _, call in sorted(journal.items())]
        self.writes += 1
        written = [replace(call, epoch=epoch, revision=self.writes) for call in write]
        for asked, new in zip(write, written, strict=True):
            known = journal.get(new.number)
            if known is not None and not known.same_as(new) and known.revision != asked.revision:
                raise RoostError(Reason.TURN_NOT_COMMITTED, "another write came between")
        self.journals[turn_id] = {**journal, **{call.number: call for call in written}}
        if self.lost_answers:
            self.lost_answers -= 1
            raise RoostError(Reason.COORDINATOR_UNREACHABLE, "the answer was lost")
        return written

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
