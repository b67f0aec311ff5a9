"""The node's own copies of chunks, so that most restores and rollbacks need no network."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from shared.content import Blob, is_hash
from shared.errors import RoostError


class ChunkStore:
    """A cache of blobs in `directory`, which is made if need be. Synchronous; safe for threads.

    What must hold: `get` returns what was put or nothing. Each read verifies, and what fails is deleted, so
    a half-written, bit-flipped or power-cut chunk is merely fetched again. That is why nothing is synced
    here: durability is the blob store's promise, and a commit is published only after it has everything.
    How it can fail: OSError, when the disk is full or broken.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def missing(self, hashes: Iterable[str]) -> set[str]:
        """Those of which there is no copy. One that is there may still prove corrupt when read."""
        return {hash for hash in hashes if not self._path(hash).exists()}

    def get(self, hash: str) -> Blob | None:
        path = self._path(hash)
        try:
            return Blob.verified(hash, path.read_bytes())
        except FileNotFoundError:
            return None
        except RoostError:
            path.unlink(missing_ok=True)
            return None

    def put(self, blob: Blob) -> None:
        path = self._path(blob.hash)
        temporary = path.with_name(f".{blob.hash}-{secrets.token_hex(4)}")
        try:
            try:
                temporary.write_bytes(blob.zstd)
            except FileNotFoundError:
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary.write_bytes(blob.zstd)
            os.rename(temporary, path)
        except OSError:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise

    def _path(self, hash: str) -> Path:
        if not is_hash(hash):  # a hash becomes a path
            raise ValueError(f"{hash!r} is no hash")
        return self._directory / hash[:2] / hash
