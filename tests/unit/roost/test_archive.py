"""Archives of state: what comes back, and what hostile ones can't do."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from roost import _archive
from shared.content import Blob, chunks_of_bytes, hash_of
from shared.errors import Reason, RoostError
from shared.manifest import DirNode, FileNode, LinkNode, Node

MOST = 4 << 30


class FakeChunks:
    def __init__(self, *contents: bytes) -> None:
        self.kept = {hash_of(c): Blob.of(c) for content in contents for c in chunks_of_bytes(content)}

    async def get(self, hashes: Sequence[str]) -> AsyncIterator[Blob]:
        for hash in hashes:
            yield self.kept[hash]


def file(path: str, content: bytes, mode: int = 0o640, mtime_ns: int = 1_700_000_000_123_456_789) -> FileNode:
    return FileNode(path, mode, mtime_ns, len(content), tuple(map(hash_of, chunks_of_bytes(content))))


BIG = os.urandom(700_000)
NODES: tuple[Node, ...] = (
    DirNode("a", 0o500),
    file("a/a" + "n" * 200, b"long name"),
    file("a/empty", b""),
    LinkNode("a/link", "../../etc/passwd"),
    DirNode("b", 0o755),
    file("b/big", BIG, 0o755, -1_500_000_000),
    file("caf\u00e9", b"x"),
    file("raw\udcff", b"not UTF-8", mtime_ns=0),
)


async def test_what_was_written_is_read_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "state.tar"
    chunks = FakeChunks(b"long name", BIG, b"x", b"not UTF-8")
    await _archive.write(path, NODES, chunks)  # type: ignore[arg-type]
    read = await _archive.read(path, MOST)
    assert read.nodes == NODES
    assert {hash: read.plain(hash) for hash in read.chunks} == {h: b.plain for h, b in chunks.kept.items()}
    assert os.listdir(tmp_path) == ["state.tar"]
    with tarfile.open(path) as tar:  # by the tool that everybody has
        assert tar.extractfile("b/big").read() == BIG  # type: ignore[union-attr]
        assert (tar.getmember("b/big").mode, tar.getmember("a/link").linkname) == (0o755, "../../etc/passwd")


async def test_a_chunk_that_can_not_be_had_leaves_no_archive(tmp_path: Path) -> None:
    class Broken(FakeChunks):
        async def get(self, hashes: Sequence[str]) -> AsyncIterator[Blob]:
            raise RoostError(Reason.BLOB_CORRUPT, "flipped")
            yield

    with pytest.raises(RoostError):
        await _archive.write(tmp_path / "state.tar", NODES, Broken())  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == []


def tar(*entries: tuple[str, bytes, dict[str, object]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, content, changes in entries:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for field, value in changes.items():
                setattr(info, field, value)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


async def read(tmp_path: Path, data: bytes, most: int = MOST) -> _archive.Read:
    (tmp_path / "in.tar").write_bytes(data)
    return await _archive.read(tmp_path / "in.tar", most)


async def test_an_archive_of_another_tool(tmp_path: Path) -> None:
    found = await read(
        tmp_path,
        tar(
            ("./", b"", {"type": tarfile.DIRTYPE}),
            ("./sub/file", b"1", {"mode": 0o4755}),
            ("./sub/hard", b"", {"type": tarfile.LNKTYPE, "linkname": "./sub/file"}),
            ("./twice", b"old", {}),
            ("./twice", b"new", {}),
        ),
    )
    assert [(n.path, getattr(n, "mode", None)) for n in found.nodes] == [
        ("sub", 0o755),
        ("sub/file", 0o755),
        ("sub/hard", 0o755),
        ("twice", 0o644),
    ]
    assert found.nodes[3].chunks == (hash_of(b"new"),)  # type: ignore[union-attr]


GOOD = tar(("a", b"x" * 2000, {}), ("b", b"y" * 2000, {}))
HOSTILE = {
    "dots": tar(("../a", b"", {})),
    "dots inside": tar(("a/../../b", b"", {})),
    "absolute": tar(("/etc/passwd", b"", {})),
    "a hard link out": tar(("a", b"", {"type": tarfile.LNKTYPE, "linkname": "/etc/shadow"})),
    "a device": tar(("a", b"", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3})),
    "a pipe": tar(("a", b"", {"type": tarfile.FIFOTYPE})),
    "below a link": tar(("a", b"", {"type": tarfile.SYMTYPE, "linkname": "/etc"}), ("a/b", b"", {})),
    "below a file": tar(("a", b"", {}), ("a/b", b"", {})),
    "our own names": tar((".roost-tmp-x", b"", {})),
    "an empty name": tar(("", b"", {})),
    "a long name": tar(("x" * 300, b"", {})),
    "a deep one": tar(("a/" * 80 + "b", b"", {})),
    "no archive": b"hello" * 500,
    "nothing": b"",
    "compressed": b"\x1f\x8b\x08" + b"0" * 1000,
    "cut in a file": GOOD[:1000],
    "cut between": GOOD[: 512 + 2048],
    "a flipped header": GOOD[: 512 + 2048 + 10] + b"\xff" + GOOD[512 + 2048 + 11 :],
}


@pytest.mark.parametrize("what", HOSTILE)
async def test_a_hostile_archive_is_refused_by_name(tmp_path: Path, what: str) -> None:
    with pytest.raises(RoostError) as caught:
        await read(tmp_path, HOSTILE[what])
    assert caught.value.reason is Reason.BAD_REQUEST


@pytest.mark.parametrize("claimed", [b"77777777777", b"\x80" + b"\x00" * 3 + b"\x01" * 8])
async def test_a_header_that_claims_gigabytes_takes_no_memory(tmp_path: Path, claimed: bytes) -> None:
    for kind in (b"x", b"L", b"g", b"0"):
        header = bytearray(tar(("a", b"", {}))[:512])
        header[124 : 124 + 12] = claimed.ljust(12, b"\0")
        header[156:157] = kind
        header[148:156] = b"        "
        header[148:156] = b"%06o\0 " % sum(header)
        with pytest.raises(RoostError):
            await read(tmp_path, bytes(header) + bytes(2048))


async def test_more_than_the_instance_may_have_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with pytest.raises(RoostError) as caught:
        await read(tmp_path, tar(("a", b"x" * 600, {}), ("b", b"x" * 600, {})), most=1000)
    assert caught.value.reason is Reason.STATE_TOO_LARGE
    assert "'b'" in caught.value.message
    links = [(f"l{i}", b"", {"type": tarfile.LNKTYPE, "linkname": "a"}) for i in range(9)]
    with pytest.raises(RoostError) as caught:
        await read(tmp_path, tar(("a", b"x" * 600, {}), *links), most=5000)
    assert caught.value.reason is Reason.STATE_TOO_LARGE


async def test_a_directory_or_a_pipe_is_no_archive(tmp_path: Path) -> None:
    with pytest.raises(RoostError):
        await _archive.read(tmp_path, MOST)
