"""Brings what is committed of an instance to this node's disk before it is needed there.

Only chunks are brought, as copies that are verified again when they are read: so it can be cut off, or be for
nothing, without harm. How it can fail: as reading a manifest and the blob store can.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from edge_agent.state.peers import near
from edge_agent.state.store import StateStore
from shared.content import Blob
from shared.identity import InstanceKey
from shared.manifest import blobs_of

_AT_ONCE = 64  # chunks in memory


async def prefetch(store: StateStore, key: InstanceKey, version: int, root: str) -> int:
    """Bytes that had to be fetched, compressed, but for the manifest's."""
    manifest = await store.load(key, version, root)
    absent = sorted(await asyncio.to_thread(store.chunks.missing, blobs_of(manifest.nodes)))
    fetched, blobs = 0, near(store.blobs, str(key))
    for start in range(0, len(absent), _AT_ONCE):
        found = (await blobs.get(absent[start : start + _AT_ONCE])).values()
        await asyncio.to_thread(_keep, store, found)
        fetched += sum(len(blob.zstd) for blob in found)
    return fetched


def _keep(store: StateStore, blobs: Iterable[Blob]) -> None:
    for blob in blobs:
        store.chunks.put(blob)
