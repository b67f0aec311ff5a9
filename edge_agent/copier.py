"""In the background, after commits: copies of what is new to peers of the site; and what the blob store
turned out to lack, back into it.

Always true: no turn waits for any of it, and no more than the configured bandwidth is used. Of an instance
that commits faster than it can be copied, the newest version is. How it can fail: a peer is gone or full (it
is tried again later), a chunk is gone from this disk (it is left out). A copy that is not whole is of less
use, and each `_WHOLE`th is compared as a whole, since peers forget what they have no room for.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from edge_agent.state.chunks import ChunkStore
from edge_agent.state.peers import Asked, Peers, SiteBlobs
from edge_agent.state.store import StateStore
from shared.content import Blob
from shared.errors import RoostError
from shared.identity import InstanceKey
from shared.manifest import StateManifest, blobs_of, encode

log = logging.getLogger(__name__)

PERIOD = 5.0  # seconds; it is woken by each commit
_GROUP = 64  # chunks at a time
_HASHES = 2048  # in one question
_WHOLE = 64  # versions
_KEPT = 4096  # instances of which is known what was copied last


@dataclass(frozen=True, slots=True)
class Version:
    version: int
    root: str


@dataclass(frozen=True, slots=True)
class Copied:
    """What a peer was last given. `since`: versions since all of it was compared."""

    version: Version
    since: int


class Copier:
    """`reconcile` is to be run when `offer` was called (`wake`), and every PERIOD seconds."""

    def __init__(
        self, state: StateStore, blobs: SiteBlobs, peers: Peers, copies: int, bandwidth: int
    ) -> None:
        """`copies` of each version, on as many peers; `bandwidth` in bytes a second."""
        self._state = state
        self._blobs = blobs
        self._peers = peers
        self._copies = copies
        self._bandwidth = bandwidth
        self._wanted: dict[InstanceKey, Version] = {}
        self._copied: dict[tuple[InstanceKey, str], Copied] = {}

    def offer(self, key: InstanceKey, version: int, root: str) -> None:
        """A version was committed: copies are wanted."""
        if self._copies:
            self._wanted[key] = Version(version, root)

    async def reconcile(self) -> None:
        await self._restock()
        for key, version in list(self._wanted.items()):
            del self._wanted[key]
            try:
                done = await self._copy(key, version)
            except (RoostError, OSError) as error:
                log.info("version %d of %s is not copied: %s", version.version, key, error)
                done = True  # it is gone from this disk, too: the next version may be more lucky
            if not done and len(self._wanted) < _KEPT:
                self._wanted.setdefault(key, version)

    # --- to the peers --------------------------------------------------------------------------------

    async def _copy(self, key: InstanceKey, version: Version) -> bool:
        """Has somebody a copy now?"""
        peers = self._peers.responsible(str(key))[: self._copies]
        if not peers:
            return False
        manifest = await self._state.load(key, version.version, version.root)
        encoded = await asyncio.to_thread(encode, manifest)
        done = False
        for peer in peers:
            before = self._copied.get((key, peer.node))
            whole = before is None or before.since + 1 >= _WHOLE
            chunks = blobs_of(manifest.nodes)
            if before is not None and not whole:
                chunks -= await self._had(key, before.version)
            try:
                line = await self._peers.line(peer)
                # The manifest last: who has it has most likely all that it names.
                sent = await self._send(line, sorted(chunks))
                parts = [Blob.of(plain) for plain in encoded.blobs.values()]
                await line.put(parts)
            except RoostError as error:
                log.info("%s takes no copies: %s", peer.node, error.message)
                self._peers.avoid(peer)
                self._copied.pop((key, peer.node), None)
                continue
            log.debug("version %d of %s is on %s, too: %d bytes", version.version, key, peer.node, sent)
            while len(self._copied) >= _KEPT:
                del self._copied[next(iter(self._copied))]
            since = 0 if before is None or whole else before.since + 1
            self._copied[key, peer.node] = Copied(version, since)
            done = True
        return done

    async def _had(self, key: InstanceKey, version: Version) -> set[str]:
        try:
            manifest: StateManifest = await self._state.load(key, version.version, version.root)
        except RoostError:
            return set()
        return blobs_of(manifest.nodes)

    async def _send(self, line: Asked, hashes: Sequence[str]) -> int:
        sent = 0
        for start in range(0, len(hashes), _HASHES):
            absent = sorted(await line.missing(hashes[start : start + _HASHES]))
            for first in range(0, len(absent), _GROUP):
                group = await asyncio.to_thread(_read, self._state.chunks, absent[first : first + _GROUP])
                await line.put(group)
                size = sum(len(blob.zstd) for blob in group)
                sent += size
                await asyncio.sleep(size / self._bandwidth)
        return sent

    # --- back to the blob store ----------------------------------------------------------------------

    async def _restock(self) -> None:
        """What was had without the blob store is looked for there; what it lacks is put back, in a later pass
        if the node has not kept it yet: that comes after its user was served."""
        lacking = self._blobs.lacking
        all_of_them = list(lacking.items())
        for start in range(0, len(all_of_them), _GROUP):
            some = dict(all_of_them[start : start + _GROUP])
            unsure = [hash for hash, certain in some.items() if not certain]
            absent = await self._blobs.missing(unsure) if unsure else set()
            absent |= {hash for hash, certain in some.items() if certain}
            found = await asyncio.to_thread(_read, self._state.chunks, absent)
            if found:
                await self._blobs.put(found)
                log.warning(
                    "the blob store lacked %d chunks, which were found elsewhere: put back", len(found)
                )
            for hash in some.keys() - (absent - {blob.hash for blob in found}):
                lacking.pop(hash, None)


def _read(chunks: ChunkStore, hashes: Collection[str]) -> list[Blob]:
    return [blob for hash in sorted(hashes) if (blob := chunks.get(hash))]
