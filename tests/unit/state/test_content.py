from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.state.chunks import IN_USE, ChunkStore
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


def test_what_the_chunk_store_noted_is_there_at_once_and_after_a_crash(tmp_path: Path) -> None:
    store = ChunkStore(tmp_path / "chunks")
    one, two, three = (Blob.of(text) for text in (b"one", b"two", b"three"))
    store.note([one, two])
    store.note([three])
    assert store.missing([one.hash, two.hash, three.hash]) == set()
    assert store.get(two.hash) == two
    log = tmp_path / "chunks" / ".recent"
    log.write_bytes(log.read_bytes()[:-3])  # the power went in the midst of it
    successor = ChunkStore(tmp_path / "chunks")
    assert successor.missing([one.hash, two.hash, three.hash]) == {three.hash}
    assert (successor.get(one.hash), successor.get(two.hash)) == (one, two)
    assert not log.exists()


def test_what_was_noted_settles_in_files(tmp_path: Path) -> None:
    store = ChunkStore(tmp_path / "chunks")
    blobs = [Blob.of(b"%d" % number) for number in range(50)]
    for blob in blobs:
        store.note([blob])
    store.settle()
    assert (tmp_path / "chunks" / ".recent").stat().st_size == 0
    assert all(store.get(blob.hash) == blob for blob in blobs)
    store.note(blobs[:1])
    assert ChunkStore(tmp_path / "chunks").get(blobs[0].hash) == blobs[0]


def test_a_log_full_of_garbage_is_no_reason_not_to_start(tmp_path: Path) -> None:
    (tmp_path / "chunks").mkdir()
    (tmp_path / "chunks" / ".recent").write_bytes(b"\xff\xfe \n\n zz zz\n" + b"a" * 64 + b" 00\n")
    store = ChunkStore(tmp_path / "chunks")
    store.note([Blob.of(b"one")])
    assert store.get(Blob.of(b"one").hash) is not None


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


def test_beyond_its_size_the_least_recently_used_go_but_none_that_is_in_use(tmp_path: Path) -> None:
    now = 1000.0
    blobs = [Blob.of(os.urandom(1000)) for _ in range(9)]
    store = ChunkStore(tmp_path / "chunks", 5500, clock_unix=lambda: now)

    def kept() -> list[Blob]:
        store.tidy()
        there = {path.name for path in (tmp_path / "chunks").rglob("*") if path.is_file()}
        return [blob for blob in blobs if blob.hash in there]

    for blob in blobs[:6]:
        now += 1
        store.put(blob)
        os.utime(tmp_path / "chunks" / blob.hash[:2] / blob.hash, (now, now))
    assert kept() == blobs[:6], "they are in use, all of them"
    now += IN_USE - 10
    assert store.get(blobs[0].hash) == blobs[0]
    assert not store.missing([blobs[1].hash])
    assert kept() == blobs[:6]
    now += 20
    store.put(blobs[6])
    assert kept() == [blobs[0], blobs[1], blobs[5], blobs[6]]
    assert kept() == [blobs[0], blobs[1], blobs[5], blobs[6]], "as little as that may stay"


def test_it_counts_what_an_earlier_process_left(tmp_path: Path) -> None:
    blobs = [Blob.of(os.urandom(1000)) for _ in range(6)]
    first = ChunkStore(tmp_path / "chunks", 1 << 20)
    for i, blob in enumerate(blobs):
        first.put(blob)
        path = tmp_path / "chunks" / blob.hash[:2] / blob.hash
        os.utime(path, (i, i))
    unfinished = path.parent / f".{blobs[0].hash}-aaaa"
    unfinished.write_bytes(b"unfinished")
    os.utime(unfinished, (0, 0))
    second = ChunkStore(tmp_path / "chunks", 3500)
    second.tidy()
    assert second.missing([blob.hash for blob in blobs]) == {blob.hash for blob in blobs[:3]}
    assert len([p for p in tmp_path.rglob("*") if p.is_file()]) == 3


def test_a_clock_that_is_set_back_keeps_nothing_for_ever(tmp_path: Path) -> None:
    now = 1e6
    blobs = [Blob.of(os.urandom(1000)) for _ in range(6)]
    store = ChunkStore(tmp_path / "chunks", 3500, in_use=10.0, clock_unix=lambda: now)
    for blob in blobs:
        store.put(blob)
        os.utime(tmp_path / "chunks" / blob.hash[:2] / blob.hash, (now, now))
    now -= 86400
    store.tidy()
    assert not store.missing(blob.hash for blob in blobs[:1]), "as if used just now"
    now += 20
    store.tidy()
    assert len([p for p in tmp_path.rglob("*") if p.is_file()]) <= 3
