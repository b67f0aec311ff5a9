"""What the index says of a file is true, even where the file's times alone would lie."""

from __future__ import annotations

import mmap
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from edge_agent.state.chunks import ChunkStore
from edge_agent.state.files import Entry, Kind
from edge_agent.state.index import SETTLED_NS, Index, Known, boot_id
from edge_agent.state.local_files import LocalFiles
from edge_agent.state.snapshot import capture
from edge_agent.state.tree import write_back
from shared.content import hash_of

ENTRY = Entry("a\udcff", Kind.FILE, 0o600, size=5, mtime_ns=10, ctime_ns=11, inode=12)
CHUNKS = ("0" * 64,)


def index_of(racy: bool = False, boot: str | None = None) -> Index:
    return Index(boot or boot_id(), True, {ENTRY.path: Known.of(ENTRY, CHUNKS, racy)})


def test_a_file_that_looks_the_same_is_known() -> None:
    assert index_of().knows(ENTRY) == CHUNKS
    assert index_of().knows(replace(ENTRY, mode=0o644)) == CHUNKS


@pytest.mark.parametrize(
    "change", [{"size": 6}, {"mtime_ns": 9}, {"ctime_ns": 9}, {"inode": 9}, {"path": "b"}, {"kind": Kind.DIR}]
)
def test_a_file_that_looks_different_is_not(change: dict[str, object]) -> None:
    assert index_of().knows(replace(ENTRY, **change)) is None  # type: ignore[arg-type]


def test_neither_is_one_that_had_not_settled_nor_one_of_another_boot() -> None:
    assert index_of(racy=True).knows(ENTRY) is None
    assert index_of(boot="another").knows(ENTRY) is None


def test_an_index_survives_a_restart_as_json() -> None:
    assert Index.from_json(index_of().to_json()) == index_of()


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "null", '{"format":2}', '{"format":1,"boot":"","files":{"a":3}}']
)
def test_what_is_no_index_is_none(text: str) -> None:
    assert Index.from_json(text) is None


async def test_a_second_write_within_the_clocks_tick_is_not_missed(tmp_path: Path) -> None:
    chunks = ChunkStore(tmp_path / "chunks")
    (tmp_path / "state").mkdir()
    path = tmp_path / "state" / "file"
    path.write_bytes(b"first")
    stamped = path.stat().st_ctime_ns
    with LocalFiles(tmp_path / "state") as files:
        soon = await capture(files, None, chunks, lambda: stamped + SETTLED_NS - 1)
        assert soon.index.files["file"].racy
        settled = await capture(files, None, chunks, lambda: stamped + SETTLED_NS)
        assert not settled.index.files["file"].racy


async def test_a_write_through_a_mapping_is_not_missed(tmp_path: Path) -> None:
    chunks = ChunkStore(tmp_path / "chunks")
    (tmp_path / "state").mkdir()
    path = tmp_path / "state" / "file"
    path.write_bytes(bytes(10_000))
    fd = os.open(path, os.O_RDWR)
    mapping = mmap.mmap(fd, 10_000)
    os.close(fd)
    if not _mappings_show(path, mapping):
        pytest.skip("this file system (tmpfs?) never shows writes through a mapping")
    with LocalFiles(tmp_path / "state") as files:
        mapping[0:5] = b"first"  # dirties the page: from now on writes to it change no times
        index = None
        for content in (b"AAAAA", b"BBBBB", b"CCCCC"):
            mapping[0:5] = content
            snapshot = await capture(files, index, chunks, lambda: time.time_ns() + 10**9)
            index = snapshot.index
            assert index.files["file"].chunks == (hash_of(content + bytes(9_995)),)
    mapping.close()


def _mappings_show(path: Path, mapping: mmap.mmap) -> bool:
    fd = os.open(path, os.O_RDONLY)
    try:
        mapping[0:1] = b"x"
        write_back(fd)
        before = os.fstat(fd).st_mtime_ns
        deadline = time.monotonic() + 1
        while time.time_ns() < before + SETTLED_NS and time.monotonic() < deadline:
            pass  # the next tick of the clock that files are stamped by
        mapping[0:1] = b"y"
        return os.fstat(fd).st_mtime_ns != before
    finally:
        os.close(fd)
