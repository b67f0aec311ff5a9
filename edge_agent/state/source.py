"""Where the chunks of a restore come from: what was just fetched, as far as it is held in memory, the node's
copies, and the blob store.

What must hold: a chunk that it gives is verified. How it can fail: RESTORE_INCOMPLETE names the file that
can't be had; BLOBS_UNAVAILABLE means that trying again may help.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress

from edge_agent.state.blobs import Blobs
from edge_agent.state.chunks import ChunkStore
from edge_agent.state.threads import each_of
from shared.content import Blob
from shared.errors import Reason, RoostError
from shared.manifest import FileNode, blobs_of

AT_ONCE = 32  # chunks in one request
_FETCHES = 3  # requests at a time; their chunks are in memory
_HELD = 16 << 20  # plain bytes in memory of what was fetched; the rest goes through the node's copies
_KEEP_SECONDS = 0.5


class Source:
    def __init__(self, chunks: ChunkStore, blobs: Blobs) -> None:
        self._chunks = chunks
        self._blobs = blobs
        self._held: dict[str, Blob] = {}
        self._left = _HELD

    def get(self, hash: str) -> Blob | None:
        """If it is here."""
        return self._held.get(hash) or self._chunks.get(hash)

    async def fetch_all(self, nodes: Sequence[FileNode]) -> None:
        absent = await asyncio.to_thread(self._chunks.missing, blobs_of(nodes))
        wanted: dict[str, FileNode] = {}
        for node in nodes:
            wanted |= {hash: node for hash in node.chunks if hash in absent}
        hashes = list(wanted)
        groups = [hashes[at : at + AT_ONCE] for at in range(0, len(hashes), AT_ONCE)]
        await each_of(groups, _FETCHES, lambda some: self.fetch(wanted, some))

    async def some(self, node: FileNode, hashes: Sequence[str]) -> list[Blob]:
        """A few chunks of this file."""
        found = await asyncio.to_thread(self._here, hashes)
        absent = list(dict.fromkeys(hash for hash in hashes if hash not in found))
        if absent:
            found |= await self.fetch(dict.fromkeys(absent, node), absent)
        return [found[hash] for hash in hashes]

    def _here(self, hashes: Sequence[str]) -> dict[str, Blob]:
        return {hash: blob for hash in hashes if (blob := self.get(hash))}

    async def fetch(self, wanted: Mapping[str, FileNode], hashes: Sequence[str]) -> dict[str, Blob]:
        """`wanted` by which file; RESTORE_INCOMPLETE names one."""
        try:
            found = await self._blobs.get(hashes)
        except RoostError as error:
            if error.reason in (Reason.BLOB_MISSING, Reason.BLOB_CORRUPT):
                blamed = next((hash for hash in hashes if hash[:12] in error.message), hashes[0])
                raise incomplete(wanted[blamed], error.message) from error
            raise
        self._left -= sum(len(blob.plain) for blob in found.values())
        if self._left >= 0:
            self._held |= found
        else:
            await asyncio.to_thread(_keep, self._chunks, found.values())
        return found

    def keep_soon(self) -> None:
        """What is held becomes copies of this node, when who waits for the instance has been served."""
        self._left = 0

        def keep() -> None:
            _keep(self._chunks, self._held.values())
            self._held = {}

        if self._held:
            loop = asyncio.get_running_loop()
            loop.call_later(_KEEP_SECONDS, lambda: loop.run_in_executor(None, keep))


def _keep(chunks: ChunkStore, blobs: Iterable[Blob]) -> None:
    with suppress(OSError):  # they are only copies
        for blob in blobs:
            chunks.put(blob)


def incomplete(node: FileNode, why: str) -> RoostError:
    return RoostError(
        Reason.RESTORE_INCOMPLETE,
        f"{node.path!r} can't be restored: {why}",
        "the instance is not started with less than it had; bring back the blob, then try again",
    )
