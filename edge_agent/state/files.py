"""The seam between a tree of files and what reads or restores it.

Real: the jail's init or the node's file service, which touch them for the daemon
(`edge_agent.jail.remote_files`). Plain: a directory of this process (`LocalFiles`), for bundles and tests.
Both pass tests/contract/test_files.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

MAX_STATE = 4 << 30  # bytes of all files together; a sparse file may claim to be of any size


class Kind(StrEnum):
    FILE = "file"
    DIR = "dir"
    LINK = "link"


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing in a tree. `path` is relative to the tree's root, without `.` or `..`, parts joined by `/`;
    names that are not UTF-8 are carried by surrogateescape. `mode` holds permission bits only."""

    path: str
    kind: Kind
    mode: int
    size: int = 0  # bytes; 0 for directories and links
    mtime_ns: int = 0
    ctime_ns: int = 0
    inode: int = 0
    target: str = ""  # of a link, as it was written


class Files(Protocol):
    """A tree of files. Every method raises RoostError (STATE_TOO_LARGE, JAIL_FAILED) or FileNotFoundError.

    Paths are never followed through a symlink, so nothing outside the tree can be reached.
    """

    async def scan(self) -> list[Entry]:
        """All entries, parents before children, sorted by path; the root itself, sockets, fifos and
        devices are left out. STATE_TOO_LARGE beyond the entry limit."""
        ...

    async def changed(self, since_ns: int) -> tuple[list[Entry], dict[str, int]]:
        """As `scan`, with descriptors (caller closes) of a few of the files that were changed at `since_ns`
        or later, by their ctime: to spare a round trip. They are written back (`tree.write_back`), so that to
        read them waits for no disk. Any others must be opened."""
        ...

    async def open_read(self, path: str) -> int:
        """A descriptor of a regular file, which the caller closes."""
        ...

    async def open_write(self, path: str) -> int:
        """A descriptor of a new, empty, unnamed-until-committed file destined for `path` (caller closes)."""
        ...

    async def commit_write(self, entry: Entry, more: bool = False) -> Entry:
        """Puts the file opened by `open_write(entry.path)` in place, replacing what is there, with
        `entry.mode` and `entry.mtime_ns`; returns what a scan would now say of it. `more` is to be written to
        it there: `written` follows."""
        ...

    async def written(self, path: str, mtime_ns: int, more: bool) -> Entry:
        """After something was written to a file that was put at `path`, whatever it is called by now: sets
        its time; returns what a scan would say of it, if it is still at `path`."""
        ...

    async def make_dir(self, entry: Entry) -> None:
        """Makes a directory, or sets its mode if it exists. Something else in its place is removed first."""
        ...

    async def make_link(self, entry: Entry) -> None:
        """Makes a symlink to `entry.target`, replacing what is there."""
        ...

    async def remove(self, path: str) -> None:
        """Removes a file, a link or a whole directory. Not being there is no error."""
        ...
