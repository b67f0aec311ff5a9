"""An agent's directory as a tree manifest: code travels and rests in the same form as state.

What must hold: the same files give the same root on every machine, so times and owners are left out and of
the mode only whether a file may be executed is kept.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from shared.content import chunks_of, hash_of
from shared.errors import Reason, RoostError
from shared.manifest import DirNode, FileNode, LinkNode, Node, encode_tree
from shared.units import format_size

MAX_BYTES = 64 << 20
MAX_FILES = 10_000

_IGNORED = frozenset({".git", ".roost-state", ".venv", "__pycache__"})
_IGNORED_SUFFIX = ".pyc"


@dataclass(frozen=True, slots=True)
class Bundle:
    """An agent's files: the manifest's root, and every blob that it needs, hash to plain bytes."""

    root: str
    blobs: dict[str, bytes]


def pack(directory: Path) -> Bundle:
    """Reads an agent's directory. AGENT_INVALID says which file is in the way, and what to do about it."""
    packing = _Packing(directory)
    try:
        packing.add(directory, "")
        packing.nodes.sort(key=lambda node: node.path)
        encoded = encode_tree(packing.nodes)
    except OSError as error:
        raise RoostError(Reason.AGENT_INVALID, f"{directory} can't be read: {error}") from error
    except ValueError as error:
        raise RoostError(Reason.AGENT_INVALID, f"{directory}: {error}", "rename or remove it") from error
    return Bundle(encoded.root, packing.blobs | encoded.blobs)


class _Packing:
    def __init__(self, root: Path) -> None:
        self.nodes: list[Node] = []
        self.blobs: dict[str, bytes] = {}
        self._root = root
        self._left = MAX_BYTES

    def add(self, directory: Path, prefix: str) -> None:
        with os.scandir(directory) as items:
            for item in items:
                if item.name not in _IGNORED and not item.name.endswith(_IGNORED_SUFFIX):
                    self._one(item, prefix + item.name)

    def _one(self, item: os.DirEntry[str], path: str) -> None:
        if len(self.nodes) >= MAX_FILES:
            raise _invalid(
                f"{self._root} has more than {MAX_FILES:,} files",
                "deploy a directory that holds the agent alone; its dependencies belong to the node",
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
                self.blobs[chunks[-1]] = chunk
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
