from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.state.chunks import ChunkStore
from shared.content import MAX_BLOB, Blob, chunks_of, chunks_of_bytes, hash_of, is_hash
from shared.errors import Reason, RoostError


def noise(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


def cut(path: Path, limit: int = 1 << 40) -> list[bytes]:
    fd = os.open(path, os.O_RDONLY)
    try:
        return list(chunks_of(fd, limit))
    finally:
        os.close(fd)


@given(st.binary(max_size=1000))
def test_a_blob_survives_its_journey(plain: bytes) -> None:
    blob = Blob.of(plain)
    assert Blob.verified(blob.hash, blob.zstd) == blob
    assert is_hash(blob.hash)


@pytest.mark.parametrize("size", [0, 1, 16_384, 262_144, 262_145, 1 << 20, (1 << 20) + 1, 5_000_000])
def test_a_streamed_file_is_cut_like_the_whole(tmp_path: Path, size: int) -> None:
    data = noise(size)
    (tmp_path / "f").write_bytes(data)
    chunks = cut(tmp_path / "f")
    assert b"".join(chunks) == data
    assert chunks == list(chunks_of_bytes(data))
    assert all(16_384 <= len(chunk) <= 262_144 for chunk in chunks[:-1])


def test_no_more_than_the_limit_is_read(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(noise(3_000_000))
    assert sum(map(len, cut(tmp_path / "f", 2_000_001))) == 2_000_001
    assert cut(tmp_path / "f", 0) == []


def test_an_insertion_changes_few_chunks() -> None:
    data = noise(4_000_000)
    before = set(map(hash_of, chunks_of_bytes(data)))
    after = set(map(hash_of, chunks_of_bytes(data[:2_000_000] + b"inserted" + data[2_000_000:])))
    assert len(after - before) <= 3


def test_the_cuts_stay_what_they_are() -> None:
    """Other cuts would store everything that is committed a second time: change them knowingly."""
    sizes = [len(chunk) for chunk in chunks_of_bytes(noise(500_000))]
    assert sizes == [53939, 68691, 87924, 50444, 46420, 63615, 106484, 22483]


BOMB = zstandard.ZstdCompressor(level=19).compress(bytes(256 << 20))
UNSIZED_BOMB = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(64 << 20))
GOOD = Blob.of(b"hello")


@pytest.mark.parametrize(
    "zstd",
    [
        BOMB,
        UNSIZED_BOMB,
        b"",
        b"hello",
        GOOD.zstd[:-1],
        GOOD.zstd + b"x",
        GOOD.zstd + GOOD.zstd,
        Blob.of(b"jello").zstd,
    ],
)
def test_what_is_not_the_blob_is_refused(zstd: bytes) -> None:
    with pytest.raises(RoostError) as caught:
        Blob.verified(GOOD.hash, zstd)
    assert caught.value.reason is Reason.BLOB_CORRUPT


@given(st.integers(0, 7), st.data())
def test_a_flipped_bit_never_gives_other_bytes(bit: int, data: st.DataObject) -> None:
    blob = Blob.of(b"hello, hello, hello")
    at = data.draw(st.integers(0, len(blob.zstd) - 1))
    damaged = bytearray(blob.zstd)
    damaged[at] ^= 1 << bit
    try:
        assert Blob.verified(blob.hash, bytes(damaged)).plain == blob.plain  # an unused bit of the header
    except RoostError as error:
        assert error.reason is Reason.BLOB_CORRUPT


def test_a_blob_has_a_largest_size() -> None:
    assert len(Blob.of(bytes(MAX_BLOB)).plain) == MAX_BLOB
    with pytest.raises(ValueError):
        Blob.of(bytes(MAX_BLOB + 1))


@pytest.mark.parametrize(
    "text", ["", "0" * 63, "0" * 65, "G" * 64, "A" * 64, "0" * 64 + "\n", "../" * 22, 7, None]
)
def test_no_hash(text: object) -> None:
    assert not is_hash(text)


def test_the_nodes_chunk_store_keeps_verifies_and_forgets(tmp_path: Path) -> None:
    store = ChunkStore(tmp_path / "chunks")
    one, two = Blob.of(b"one"), Blob.of(b"two")
    assert store.get(one.hash) is None
    store.put(one)
    store.put(one)
    assert store.get(one.hash) == one
    assert store.missing([one.hash, two.hash]) == {two.hash}
    path = tmp_path / "chunks" / one.hash[:2] / one.hash
    path.write_bytes(two.zstd)
    assert store.get(one.hash) is None
    assert store.missing([one.hash]) == {one.hash}
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
    with pytest.raises(ValueError):
        store.get("../../etc/passwd")
