"""Content-addressed bytes: what they are named, how files are cut into them, how they travel and rest.

A blob is at most MAX_BLOB bytes, is named by its BLAKE3-256 in hex, and travels and rests compressed with
zstd. What must hold: whoever has a `Blob` has bytes that match its hash, as there are only two ways to get
one, hashing the bytes and verifying them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

import zstandard
from blake3 import blake3

# The extension itself: the package's Python fallback would be a hundred times slower, unnoticed.
from fastcdc.fastcdc_cy import fastcdc_cy

from shared.errors import Reason, RoostError

MAX_BLOB = 1 << 20  # bytes, plain

# Small files and one row of a database cost little; a gigabyte still has a manifest of about 1 MiB.
_MIN_CHUNK, _AVERAGE_CHUNK, _MAX_CHUNK = 16 << 10, 64 << 10, 256 << 10
_WINDOW = 1 << 20  # bytes of a file held in memory while it is cut
_LEVEL = 3
_HASH = re.compile(r"[0-9a-f]{64}")


def hash_of(plain: bytes) -> str:
    return blake3(plain).hexdigest()


def is_hash(text: object) -> bool:
    return isinstance(text, str) and _HASH.fullmatch(text) is not None


@dataclass(frozen=True, slots=True)
class Blob:
    """Bytes that match their hash. Made by `of` or `verified` only."""

    hash: str
    plain: bytes
    zstd: bytes

    @classmethod
    def of(cls, plain: bytes) -> Blob:
        """ValueError beyond MAX_BLOB."""
        if len(plain) > MAX_BLOB:
            raise ValueError(f"{len(plain)} bytes are too many for a blob")
        return cls(hash_of(plain), plain, zstandard.ZstdCompressor(level=_LEVEL).compress(plain))

    @classmethod
    def verified(cls, hash: str, zstd: bytes) -> Blob:
        """The blob `hash`, from compressed bytes that somebody sent or kept. BLOB_CORRUPT if they differ."""
        plain = _decompress(zstd)
        if plain is None or hash_of(plain) != hash:
            raise RoostError(
                Reason.BLOB_CORRUPT,
                f"the bytes kept for blob {hash[:12]} are not what its name says",
                "the copy was damaged or forged; the original may still be elsewhere",
            )
        return cls(hash, plain, zstd)


def _decompress(zstd: bytes) -> bytes | None:
    """None for what is no single frame of at most MAX_BLOB plain bytes; never allocates more."""
    try:
        # The size that a frame declares is allocated whatever max_output_size says, so look at it first.
        if zstandard.frame_content_size(zstd) > MAX_BLOB:
            return None
        return zstandard.ZstdDecompressor().decompress(zstd, max_output_size=MAX_BLOB, allow_extra_data=False)
    except zstandard.ZstdError:
        return None


def chunks_of(fd: int, limit: int) -> Iterator[bytes]:
    """Cuts what the descriptor holds from where it stands, at places that its content chooses, so that an
    insertion moves few cuts. Reads at most `limit` bytes, and holds at most 1 MiB of them at a time."""
    buffer = b""
    while True:
        wanted = min(_WINDOW - len(buffer), limit)
        more = _read(fd, wanted)
        limit -= len(more)
        ended = limit == 0 or len(more) < wanted
        buffer += more
        start = 0
        for cut in _cuts(buffer):
            # A cut is only certain when all that it may depend on has been read.
            if not ended and len(buffer) - start < _MAX_CHUNK:
                break
            yield buffer[start:cut]
            start = cut
        if ended:
            return
        buffer = buffer[start:]


def chunks_of_bytes(data: bytes) -> Iterator[bytes]:
    """As `chunks_of`, of bytes in memory."""
    start = 0
    for cut in _cuts(data):
        yield data[start:cut]
        start = cut


def _cuts(data: bytes) -> Iterator[int]:
    for chunk in fastcdc_cy(data, _MIN_CHUNK, _AVERAGE_CHUNK, _MAX_CHUNK):
        yield chunk.offset + chunk.length


def _read(fd: int, count: int) -> bytes:
    """`count` bytes, or fewer at the end of the file."""
    parts: list[bytes] = []
    while count > 0 and (part := os.read(fd, count)):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)
