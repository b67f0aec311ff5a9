"""Copies of other nodes' chunks, kept for the site: a cache that never outgrows its share of the disk.

Always true: what `get` gives is what its hash says. What has not been asked for or put for the longest goes
first; that a copy is gone means nothing, since the blob store has it. How it can fail: OSError, as any disk.
"""

from __future__ import annotations

from pathlib import Path

from edge_agent.state.chunks import ChunkStore
from shared.content import Blob


class CopyStore(ChunkStore):
    """At most `limit` bytes in `directory`, and a few more for a moment. Safe for threads."""

    def __init__(self, directory: Path, limit: int) -> None:
        super().__init__(directory, limit, in_use=0.0)

    def put(self, blob: Blob) -> None:
        if self._most_bytes > 0 and self.missing([blob.hash]):
            super().put(blob)
            self.tidy()
