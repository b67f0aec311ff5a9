"""Blobs that travel and are kept inside a commit, since they are so little: `coordinator.inline` says why.

What must hold: what comes with a commit is bounded before it is looked at, and verified before it is
published.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress

import zstandard

from protos.v1 import blobs_pb2
from shared.content import MAX_BLOB, Blob, is_hash
from shared.errors import Reason, RoostError

MAX_BLOBS = 32  # of one commit
MAX_BYTES = 64 << 10  # of one commit, compressed: etcd takes 1.5 MB, and rather little
MAX_PLAIN = MAX_BLOB  # bytes of one commit, so that they are verified in a millisecond or two


def fits(blobs: Sequence[Blob]) -> bool:
    """May these be a commit's inline part?"""
    return (
        len(blobs) <= MAX_BLOBS
        and sum(len(blob.zstd) for blob in blobs) <= MAX_BYTES
        and sum(len(blob.plain) for blob in blobs) <= MAX_PLAIN
    )


def to_protos(blobs: Iterable[Blob]) -> list[blobs_pb2.Blob]:
    return [blobs_pb2.Blob(hash=blob.hash, zstd=blob.zstd) for blob in blobs]


def verified(protos: Sequence[blobs_pb2.Blob]) -> list[Blob]:
    """A commit's inline part, as somebody sent it. BAD_REQUEST if it is more than it may be; BLOB_CORRUPT."""
    if len(protos) > MAX_BLOBS or sum(len(proto.zstd) for proto in protos) > MAX_BYTES:
        raise _too_much()
    if not all(is_hash(proto.hash) for proto in protos):
        raise RoostError(Reason.BAD_REQUEST, "an inline blob is named by no hash", "write BLAKE3-256 in hex")
    if sum(_plain_bytes(proto.zstd) for proto in protos) > MAX_PLAIN:
        raise _too_much()
    return [Blob.verified(proto.hash, proto.zstd) for proto in protos]


def readable(protos: Iterable[blobs_pb2.Blob]) -> list[Blob]:
    """Those that are what their names say. Who needs another finds it missing, and can say for what."""
    found = []
    for proto in protos:
        with suppress(RoostError):
            found.append(Blob.verified(proto.hash, proto.zstd))
    return found


def _plain_bytes(zstd: bytes) -> int:
    """As many may come out of it."""
    try:
        declared = zstandard.frame_content_size(zstd)
    except zstandard.ZstdError:
        return 0
    return declared if declared >= 0 else MAX_BLOB


def _too_much() -> RoostError:
    return RoostError(
        Reason.BAD_REQUEST,
        f"a commit may bring {MAX_BLOBS} blobs and {MAX_BYTES >> 10} KiB along",
        "put them into the blob store first",
    )
