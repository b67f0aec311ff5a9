"""Manifests of instances' state, as the blob store has them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from coordinator.blobs import BlobStore
from shared.content import Blob
from shared.manifest import StateManifest, decode


class Manifests:
    """BLOB_MISSING, BLOB_CORRUPT or BLOBS_UNAVAILABLE for what can't be had."""

    def __init__(self, blobs: BlobStore) -> None:
        self._blobs = blobs

    async def load(self, root: str) -> StateManifest:
        return await decode(root, self.fetch)

    async def fetch(
        self, hashes: Sequence[str], at_hand: Mapping[str, bytes] | None = None
    ) -> dict[str, bytes]:
        """Plain bytes by hash, verified. `at_hand`: compressed ones that need not be fetched."""
        known = at_hand or {}
        away = [hash for hash in hashes if hash not in known]
        found = dict(zip(away, await self._blobs.get_all(away), strict=True))
        found |= {hash: known[hash] for hash in hashes if hash in known}
        return await asyncio.to_thread(lambda: {h: Blob.verified(h, zstd).plain for h, zstd in found.items()})
