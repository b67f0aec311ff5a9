"""An agent's directory as a tree manifest: code travels and rests in the same form as state.

What must hold: the same files give the same root on every machine, so times and owners are left out and of
the mode only whether a file may be executed is kept.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from shared.content import chunks_of, hash_of
from shared.errors import Reason, RoostError
from shared.manifest import DirNode, FileNode, LinkNode, Node, encode_tree
from shared.units import format_size
from shared.wheels import WHEELS

MAX_BYTES = 512 << 20
MAX_FILES = 30_000

_IGNORED = frozenset({".git", ".roost-state", ".venv", "__pycache__"})
_IGNORED_SUFFIX = ".pyc"
_VENV_MARK, _OF_VENV = "pyvenv.cfg", "bin"  # which leads to the developer's own interpreter


class Blobs(Mapping[str, bytes]):
    """Plain bytes by hash. Those of files are read when they are asked for: all of them together may be more
    than a small machine's memory. AGENT_INVALID for a file that has changed since."""

    def __init__(self, kept: Mapping[str, bytes], of_files: Mapping[str, tuple[str, int, int]]) -> None:
        self._kept = kept
        self._of_files = of_files  # path, where it begins, size

    def __getitem__(self, hash: str) -> bytes:
        if hash in self._kept:
            return self._kept[hash]
        path, start, size = self._of_files[hash]
        try:
            with open(path, "rb") as file:
                file.seek(start)
                plain = file.read(size)
        except OSError as error:
            raise _invalid(f"{path} can't be read: {error}", "deploy again") from error
        if hash_of(plain) != hash:
            raise _invalid(f"{path} changed while it was deployed", "deploy again")
        return plain

    def __iter__(self) -> Iterator[str]:
        return iter({**self._kept, **self._of_files})

    def __len__(self) -> int:
        return len({**self._kept, **self._of_files})


@dataclass(frozen=True, slots=True)
class Bundle:
    """An agent's files: the manifest's root, and every blob that it needs. `size` in bytes."""

    root: str
    blobs: Mapping[str, bytes]
    size: int


def pack(directory: Path, wheels: Mapping[str, Path] | None = None) -> Bundle:
    """Reads an agent's directory. `wheels`: directories to put below `wheels/`, by name, in place of what is
    there. AGENT_INVALID says which file is in the way, and what to do about it."""
    packing = _Packing(directory)
    try:
        packing.add(directory, "", frozenset({WHEELS}) if wheels else frozenset())
        if wheels:
            packing.nodes.append(DirNode(WHEELS, 0o755))
        for name, path in (wheels or {}).items():
            packing.nodes.append(DirNode(f"{WHEELS}/{name}", 0o755))
            packing.add(path, f"{WHEELS}/{name}/")
        packing.nodes.sort(key=lambda node: node.path)
        encoded = encode_tree(packing.nodes)
    except OSError as error:
        raise RoostError(Reason.AGENT_INVALID, f"{directory} can't be read: {error}") from error
    except ValueError as error:
        raise RoostError(Reason.AGENT_INVALID, f"{directory}: {error}", "rename or remove it") from error
    size = sum(node.size for node in packing.nodes if isinstance(node, FileNode))
    return Bundle(encoded.root, Blobs(encoded.blobs, packing.blobs), size)


class _Packing:
    def __init__(self, root: Path) -> None:
        self.nodes: list[Node] = []
        self.blobs: dict[str, tuple[str, int, int]] = {}
        self._root = root
        self._left = MAX_BYTES

    def add(self, directory: Path, prefix: str, without: frozenset[str] = frozenset()) -> None:
        ignored = _IGNORED | without
        if (directory / _VENV_MARK).is_file():
            ignored |= {_OF_VENV}
        with os.scandir(directory) as items:
            for item in items:
                if item.name not in ignored and not item.name.endswith(_IGNORED_SUFFIX):
                    self._one(item, prefix + item.name)

    def _one(self, item: os.DirEntry[str], path: str) -> None:
        if len(self.nodes) >= MAX_FILES:
            raise _invalid(
                f"{self._root} has more than {MAX_FILES:,} files",
                "deploy a directory that holds the agent alone, and name its packages in requirements.txt",
            )
        if item.is_symlink():
            self.nodes.append(LinkNode(path, self._target(item, path)))
        elif item.is_dir(follow_symlinks=False):
            self.nodes.append(DirNode(path, 0o755))
            self.add(Path(item.path), path + "/")
        elif item.is_file(follow_symlinks=False):
            self.nodes.append(self._file(item, path))
        else:
            raise _invalid(f"{item.path} is no file, directory or link", "remove it")

    def _file(self, item: os.DirEntry[str], path: str) -> FileNode:
        fd = os.open(item.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            executable = os.fstat(fd).st_mode & stat.S_IXUSR
            chunks: list[str] = []
            size = 0
            for chunk in chunks_of(fd, self._left + 1):
                chunks.append(hash_of(chunk))
                self.blobs[chunks[-1]] = (item.path, size, len(chunk))
                size += len(chunk)
        finally:
            os.close(fd)
        self._left -= size
        if self._left < 0:
            raise _invalid(
                f"{self._root} is larger than {format_size(MAX_BYTES)}; {path} is what went beyond it",
                "keep models and data out of the agent's directory",
            )
        return FileNode(path, 0o755 if executable else 0o644, 0, size, tuple(chunks))

    def _target(self, item: os.DirEntry[str], path: str) -> str:
        target = os.readlink(item.path)
        resolved = Path(os.path.realpath(item.path))  # Path.resolve fails on a loop, which is harmless here
        if target.startswith("/") or not resolved.is_relative_to(os.path.realpath(self._root)):
            raise _invalid(
                f"{path} is a link to {target}, outside of {self._root}",
                "copy what it points to into the directory, or make the link relative",
            )
        return target


def _invalid(message: str, hint: str) -> RoostError:
    return RoostError(Reason.AGENT_INVALID, message, hint)
