"""A version's files as a tar archive, and an archive as files.

What must hold: writing keeps names, modes, times and links as they were, and every byte is verified; reading
takes only what a state can hold, whoever made the archive: plain names below its top, regular files,
directories and links, in bounded memory, and never more than `most_bytes`. Nothing is unpacked on the way.
How it can fail: BAD_REQUEST names the entry that can't be taken, STATE_TOO_LARGE, NODE_FAILED for a disk.
"""

from __future__ import annotations

import asyncio
import os
import re
import stat
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, assert_never

from roost._chunks import Chunks
from shared.content import chunks_of, hash_of
from shared.errors import Reason, RoostError
from shared.manifest import MAX_NODES, MAX_TIME, DirNode, FileNode, LinkNode, Node, encode_tree

_HEADER = 1 << 20  # bytes that the headers of one entry may take together
_NS = 1_000_000_000
_TIME = re.compile(r"(-?)(\d{1,12})(?:\.(\d+))?", re.ASCII)
_ESCAPE = "surrogateescape"


async def write(path: Path, nodes: Sequence[Node], chunks: Chunks) -> None:
    """Into a file of another name first: whoever finds `path` has all of it."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            for node in nodes:
                await _add(file, node, chunks)
            file.write(bytes(2 * tarfile.BLOCKSIZE))
            file.write(bytes(-file.tell() % tarfile.RECORDSIZE))
        os.replace(partial, path)
    except OSError as error:
        raise _bad(f"{path} can't be written: {error.strerror or error}") from error
    finally:
        with suppress(FileNotFoundError):
            partial.unlink()


async def _add(file: IO[bytes], node: Node, chunks: Chunks) -> None:
    file.write(_header(node).tobuf(tarfile.PAX_FORMAT, "utf-8", _ESCAPE))
    if not isinstance(node, FileNode):
        return
    written = 0
    async for blob in chunks.get(node.chunks):
        file.write(blob.plain)
        written += len(blob.plain)
    if written != node.size:
        raise RoostError(
            Reason.RESTORE_INCOMPLETE, f"{node.path!r}: its chunks make {written} bytes, not {node.size}"
        )
    file.write(bytes(-written % tarfile.BLOCKSIZE))


def _header(node: Node) -> tarfile.TarInfo:
    info = tarfile.TarInfo(node.path)
    match node:
        case DirNode():
            info.type, info.mode = tarfile.DIRTYPE, node.mode
        case LinkNode():
            info.type, info.mode, info.linkname = tarfile.SYMTYPE, 0o777, node.target
        case FileNode():
            info.mode, info.size = node.mode, node.size
            whole, part = divmod(abs(node.mtime_ns), _NS)
            info.pax_headers = {"mtime": f"{'-' if node.mtime_ns < 0 else ''}{whole}.{part:09}"}
        case _:
            assert_never(node)
    return info


@dataclass(frozen=True, slots=True)
class Read:
    """An archive's files, and where in it each chunk lies."""

    path: Path
    nodes: tuple[Node, ...]
    chunks: dict[str, tuple[int, int]]  # hash: offset, size

    def plain(self, hash: str) -> bytes:
        """The bytes of a chunk. BAD_REQUEST if the archive has changed since."""
        offset, size = self.chunks[hash]
        with _told(self.path), self.path.open("rb") as file:
            file.seek(offset)
            plain = file.read(size)
        if hash_of(plain) != hash:
            raise _bad(f"{self.path} changed while it was read")
        return plain


async def read(path: Path, most_bytes: int) -> Read:
    return await asyncio.to_thread(_read, path, most_bytes)


def _read(path: Path, most_bytes: int) -> Read:
    reading = _Reading(path, most_bytes)
    with _told(path), path.open("rb", buffering=0) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise _bad(f"{path} is no file")
        bounded = _Bounded(file)
        try:
            with tarfile.open(fileobj=bounded, mode="r:", encoding="utf-8", errors=_ESCAPE) as tar:  # type: ignore[call-overload]
                while (info := tar.next()) is not None:
                    reading.take(info, file.fileno())
                    tar.members = []  # else all of them are kept
                    bounded.left = _HEADER
                end = tar.offset
        except (tarfile.TarError, ValueError, OverflowError) as error:
            raise _bad(f"{path} is no tar archive that can be read: {error}") from error
        # A header that makes no sense ends it as silently as its end does.
        if os.pread(file.fileno(), tarfile.BLOCKSIZE, end) != bytes(tarfile.BLOCKSIZE):
            raise _bad(f"{path} is damaged or cut off, {end} bytes from its beginning")
    return Read(path, reading.finish(), reading.chunks)


class _Bounded:
    """A file whose headers are read, but not more of them than a sane archive has: one header can claim that
    it goes on for gigabytes, and would be read into memory."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.left = _HEADER

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= self.left:
            raise ValueError("the headers of an entry are too long")
        self.left -= size
        return self._file.read(size)

    def seek(self, offset: int) -> int:
        if offset < 0:
            raise ValueError("an entry lies before the beginning")
        return self._file.seek(offset)

    def tell(self) -> int:
        return self._file.tell()


@dataclass
class _Reading:
    path: Path
    left: int
    nodes: dict[str, Node] = field(default_factory=dict)
    chunks: dict[str, tuple[int, int]] = field(default_factory=dict)
    entries: int = 0

    def take(self, info: tarfile.TarInfo, fd: int) -> None:
        self.entries += 1
        if self.entries > MAX_NODES:
            raise _bad(f"{self.path} has more than {MAX_NODES:,} entries")
        name = _name(info.name)
        if name == "" and info.isdir():
            return
        if not name:
            raise _bad(f"{self.path}: {info.name!r} is no name below its top")
        self.nodes.pop(name, None)  # of several entries of one name the last one counts, as tar has it
        self._parents(name)
        self.nodes[name] = self._node(name, info, fd)

    def _node(self, name: str, info: tarfile.TarInfo, fd: int) -> Node:
        mode = info.mode & 0o777
        if info.isdir():
            return DirNode(name, mode)
        if info.issym():
            return LinkNode(name, info.linkname)
        if info.islnk():
            target = self.nodes.get(_name(info.linkname))
            if not isinstance(target, FileNode):
                raise _bad(
                    f"{self.path}: {name!r} is a hard link to {info.linkname!r}, which is no file before it"
                )
            return self._counted(FileNode(name, target.mode, target.mtime_ns, target.size, target.chunks))
        if not info.isreg() or info.sparse is not None:
            raise _bad(
                f"{self.path}: {name!r} is no plain file, directory or link",
                "devices, pipes, sockets and sparse files have no place in a state",
            )
        node = self._counted(FileNode(name, mode, _mtime_ns(info), info.size, ()))
        return FileNode(name, mode, node.mtime_ns, node.size, self._cut(name, info, fd))

    def _counted(self, node: FileNode) -> FileNode:
        if node.size < 0:
            raise _bad(f"{self.path}: {node.path!r} has no size")
        self.left -= node.size
        if self.left < 0:
            raise RoostError(
                Reason.STATE_TOO_LARGE,
                f"{self.path} holds more than the instance may have; {node.path!r} is what went beyond it",
                "deploy the agent with more resources.disk, up to 4G",
            )
        return node

    def _cut(self, name: str, info: tarfile.TarInfo, fd: int) -> tuple[str, ...]:
        hashes: list[str] = []
        offset = os.lseek(fd, info.offset_data, os.SEEK_SET)
        for chunk in chunks_of(fd, info.size):  # whoever reads the headers seeks to the next one
            hashes.append(hash_of(chunk))
            self.chunks.setdefault(hashes[-1], (offset, len(chunk)))
            offset += len(chunk)
        if offset != info.offset_data + info.size:
            raise _bad(f"{self.path} ends in the middle of {name!r}")
        return tuple(hashes)

    def _parents(self, name: str) -> None:
        """Directories that have no entry of their own."""
        parts = name.split("/")[:-1]
        for depth in range(1, len(parts) + 1):
            self.nodes.setdefault("/".join(parts[:depth]), DirNode("/".join(parts[:depth]), 0o755))

    def finish(self) -> tuple[Node, ...]:
        nodes = tuple(self.nodes[name] for name in sorted(self.nodes))
        try:
            encode_tree(nodes)
        except ValueError as error:
            raise _bad(f"{self.path} can't become a state: {error}") from error
        return nodes


def _name(text: str) -> str:
    """As a manifest has it. BAD_REQUEST for what leads elsewhere."""
    parts = [part for part in text.split("/") if part not in ("", ".")]
    if text.startswith("/") or ".." in parts:
        raise _bad(f"{text!r} leads out of the archive's top", "names must be relative, and without ..")
    return "/".join(parts)


def _mtime_ns(info: tarfile.TarInfo) -> int:
    exact = _TIME.fullmatch(info.pax_headers.get("mtime", ""))
    if exact is None:
        time = int(info.mtime) * _NS
    else:
        time = int(exact[2]) * _NS + int(((exact[3] or "") + "0" * 9)[:9])
        time = -time if exact[1] else time
    return max(-MAX_TIME, min(time, MAX_TIME))


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _bad(f"{path} can't be read: {error.strerror or error}") from error


def _bad(message: str, hint: str = "") -> RoostError:
    return RoostError(Reason.BAD_REQUEST, message, hint)
