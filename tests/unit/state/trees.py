"""Random trees for hypothesis: what they are, how they are put on disk, and what lies there."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import strategies as st

from edge_agent.state.files import Entry, Files, Kind


@dataclass(frozen=True, slots=True)
class File:
    content: bytes
    mode: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Link:
    target: bytes


@dataclass(frozen=True, slots=True)
class Dir:
    mode: int
    items: dict[bytes, Thing] = field(default_factory=dict)


Thing = File | Link | Dir

_BYTES = st.sampled_from([b"a", b"b", b"-", b".", b" ", b"\n", b"\xff", b"\xc3\xa9", b"\xed\xa0\x80", b"\\"])
_NAMES = st.lists(_BYTES, min_size=1, max_size=4).map(b"".join).filter(lambda n: n not in (b".", b".."))
# A jail's init may read what the owner shut itself out of, as root may; without root there is no such thing.
_MODES = st.sampled_from(
    [0o000, 0o400, 0o500, 0o600, 0o644, 0o755, 0o777] if os.geteuid() == 0 else [0o700, 0o755, 0o777]
)
_CONTENTS = st.one_of(
    st.binary(max_size=8),
    st.builds(
        lambda seed, size: (seed * (size // len(seed) + 1))[:size],
        st.binary(min_size=1, max_size=64),
        st.integers(0, 400_000),
    ),
)
_FILES = st.builds(File, _CONTENTS, _MODES, st.integers(-(10**18), 4 * 10**18))
_LINKS = st.builds(Link, st.sampled_from([b"a", b"../../..", b"/etc/passwd", b"\xff/x"]))


def _dirs(items: st.SearchStrategy[Thing]) -> st.SearchStrategy[Dir]:
    return st.builds(Dir, _MODES, st.dictionaries(_NAMES, items, max_size=4))


_THINGS: st.SearchStrategy[Thing] = st.recursive(_FILES | _LINKS, _dirs, max_leaves=8)
TREES = st.builds(Dir, st.just(0o755), st.dictionaries(_NAMES, _THINGS, max_size=5))


def put(tree: Dir, root: Path) -> None:
    """Makes the tree in the directory `root`, which need not be empty."""
    _put(tree, os.fsencode(root))


def _put(tree: Dir, at: bytes) -> None:
    for name, thing in tree.items.items():
        path = os.path.join(at, name)
        there = os.lstat(path) if os.path.lexists(path) else None
        if there is not None and not (isinstance(thing, Dir) and stat.S_ISDIR(there.st_mode)):
            _remove(path)
        match thing:
            case File(content, mode, mtime_ns):
                with open(path, "wb") as file:
                    file.write(content)
                os.chmod(path, mode)
                os.utime(path, ns=(mtime_ns, mtime_ns))
            case Link(target):
                os.symlink(target, path)
            case Dir(mode):
                os.makedirs(path, exist_ok=True)
                _put(thing, path)
                os.chmod(path, mode)


def _remove(path: bytes) -> None:
    if not stat.S_ISDIR(os.lstat(path).st_mode):
        os.unlink(path)
        return
    for name in os.listdir(path):
        _remove(os.path.join(path, name))
    os.rmdir(path)


async def seen(files: Files) -> dict[str, tuple[object, ...]]:
    """All that a restore must bring back, by path."""
    return {entry.path: await _seen(files, entry) for entry in await files.scan()}


async def _seen(files: Files, entry: Entry) -> tuple[object, ...]:
    match entry.kind:
        case Kind.FILE:
            fd = await files.open_read(entry.path)
            try:
                return ("file", entry.mode, entry.mtime_ns, os.read(fd, entry.size + 1))
            finally:
                os.close(fd)
        case Kind.DIR:
            return ("dir", entry.mode)
        case Kind.LINK:
            return ("link", entry.target)
