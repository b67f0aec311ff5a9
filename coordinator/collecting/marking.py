"""What is needed: all blobs of the versions that are kept, and of the agents that are deployed.

What must hold: `mark` returns all of it, or raises. What can't be read is not judged: an instance whose
manifest is damaged stops collecting, since what it needs is not known, until it is repaired or
another version of it is restored. How it can fail: STORE_UNAVAILABLE, BLOBS_UNAVAILABLE, and BLOB_MISSING or
BLOB_CORRUPT that names the instance or agent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TypeVar

from coordinator.inline import InlineCommits
from coordinator.manifests import Manifests
from coordinator.records import AGENTS, INSTANCES, AgentRecord, InstanceRecord, agent_key
from coordinator.store.base import Store
from shared.errors import Reason, RoostError
from shared.manifest import Fetch, StateManifest, blobs_of, decode, decode_tree
from shared.policy import StateSection, parse_policy

_AT_ONCE = 8  # instances whose manifests are read

_T = TypeVar("_T")

_UNREADABLE = (Reason.BLOB_MISSING, Reason.BLOB_CORRUPT)


@dataclass(slots=True)
class Needed:
    """Hashes in their raw form, by their first byte: there may be millions."""

    by_shard: list[set[bytes]] = field(default_factory=lambda: [set() for _ in range(256)])
    inline: set[str] = field(default_factory=set)  # those that are on their way to the blob store

    def add(self, hash: str) -> None:
        raw = bytes.fromhex(hash)
        self.by_shard[raw[0]].add(raw)

    def add_all(self, hashes: Iterable[str]) -> None:
        for hash in hashes:
            self.add(hash)

    def __contains__(self, hash: str) -> bool:
        raw = bytes.fromhex(hash)
        return raw in self.by_shard[raw[0]]

    def __len__(self) -> int:
        return sum(map(len, self.by_shard))

    def shard(self, number: int) -> Iterator[str]:
        return (raw.hex() for raw in self.by_shard[number])


class Marker:
    """Reads what is needed, at the time when `mark` was called or later."""

    def __init__(self, store: Store, manifests: Manifests, inline: InlineCommits) -> None:
        self._store = store
        self._manifests = manifests
        self._inline = inline

    async def mark(self) -> Needed:
        needed = Needed()
        agents = {r.key: AgentRecord.decode(r).value for r in (await self._store.list(AGENTS)).records}
        listing = await self._store.list(INSTANCES)
        instances = [InstanceRecord.decode(record).value for record in listing.records]
        await _each(list(agents.values()), lambda agent: self._bundle(agent, needed))
        await _each(instances, lambda record: self._versions(record, _history(record, agents), needed))
        return needed

    async def _bundle(self, agent: AgentRecord, needed: Needed) -> None:
        needed.add(agent.bundle_root)
        try:
            nodes = await decode_tree(agent.bundle_root, self._noting(needed))
        except RoostError as error:
            if error.reason is Reason.BLOB_MISSING:  # of no use to anybody; deploying it again puts it all
                return
            raise _blocked(f"the files of agent {agent.tenant}/{agent.name}", error) from error
        needed.add_all(blobs_of(nodes))

    async def _versions(self, record: InstanceRecord, history: int, needed: Needed) -> None:
        at_hand = {blob.hash: blob.zstd for blob in await self._inline.of(record.key)}
        needed.inline.update(at_hand)
        root = record.root
        for kept in range(history):
            if not root:
                return
            try:
                manifest = await self._version(root, needed, at_hand)
            except RoostError as error:
                if kept and error.reason is Reason.BLOB_MISSING:
                    return  # no longer kept
                raise _blocked(f"version {record.version - kept} of {record.key}", error) from error
            root = manifest.parent

    async def _version(self, root: str, needed: Needed, at_hand: Mapping[str, bytes]) -> StateManifest:
        manifest = await decode(root, self._noting(needed, at_hand))
        await asyncio.to_thread(lambda: needed.add_all(blobs_of(manifest.nodes)))
        return manifest

    def _noting(self, needed: Needed, at_hand: Mapping[str, bytes] | None = None) -> Fetch:
        """A manifest's own blobs are needed, too."""

        async def fetch(hashes: Sequence[str]) -> dict[str, bytes]:
            found = await self._manifests.fetch(hashes, at_hand)
            for hash in hashes:
                needed.add(hash)
            return found

        return fetch


def _history(record: InstanceRecord, agents: Mapping[str, AgentRecord]) -> int:
    agent = agents.get(agent_key(record.key.tenant, record.key.agent))
    return _kept(agent.policy_toml) if agent else StateSection().history


@lru_cache(maxsize=4096)
def _kept(policy_toml: str) -> int:
    return parse_policy(policy_toml).state.history


async def _each(items: Sequence[_T], work: Callable[[_T], Awaitable[None]]) -> None:
    for start in range(0, len(items), _AT_ONCE):
        await asyncio.gather(*(work(item) for item in items[start : start + _AT_ONCE]))


def _blocked(what: str, error: RoostError) -> RoostError:
    if error.reason not in _UNREADABLE:
        return error
    return RoostError(
        error.reason,
        f"nothing is collected, since {what} can't be read: {error.message}",
        "`roost state check` says what is wrong with an instance, and `repair` or `restore` put it right; an "
        "agent's files come back when it is deployed again",
    )
