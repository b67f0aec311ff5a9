"""What is known of the files that lie on this disk: which content each had when it looked a certain way.

What must hold: if `knows` says that an entry has certain chunks, its content is those chunks. Three things
could break that, and each is met:
- A write within the clock tick of the last one leaves the times as they are (git's "racily clean"). So
  what was changed less than SETTLED before it was looked at is noted as racy, and read again next time.
- A write through a shared mapping changes the times only when it makes a clean page dirty. So a file is
  written back before it is read (`tree.write_back`), which makes its pages clean: any later write shows.
- A power cut may keep the times and lose the bytes. So an index only holds in the boot that made it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from edge_agent.state.files import Entry, Kind

SETTLED_NS = 20_000_000  # twice the coarsest tick that kernels stamp files by (10 ms, at 100 Hz)

_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Known:
    """How a file looked when it had this content."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    chunks: tuple[str, ...]
    racy: bool

    @classmethod
    def of(cls, entry: Entry, chunks: tuple[str, ...], racy: bool) -> Known:
        return cls(entry.size, entry.mtime_ns, entry.ctime_ns, entry.inode, chunks, racy)

    @classmethod
    def of_untouched(cls, entry: Entry, chunks: tuple[str, ...]) -> Known:
        """Of a file that nobody but us has had open. The first write that could be missed sets the mtime to
        its own time, which can only be the one that we have just set if that was now."""
        return cls.of(entry, chunks, racy=entry.mtime_ns > entry.ctime_ns - SETTLED_NS)


@dataclass(frozen=True, slots=True)
class Index:
    """Of one tree. `uploaded`: all these chunks are known to be durable."""

    boot: str
    uploaded: bool
    files: dict[str, Known] = field(default_factory=dict)

    def knows(self, entry: Entry) -> tuple[str, ...] | None:
        """The chunks of this file, or None: it must be read."""
        known = self.files.get(entry.path)
        if known is None or entry.kind is not Kind.FILE or known.racy or self.boot != boot_id():
            return None
        same = (known.size, known.mtime_ns, known.ctime_ns, known.inode) == (
            entry.size,
            entry.mtime_ns,
            entry.ctime_ns,
            entry.inode,
        )
        return known.chunks if same else None

    def to_json(self) -> str:
        files = {
            path: [k.size, k.mtime_ns, k.ctime_ns, k.inode, list(k.chunks), k.racy]
            for path, k in self.files.items()
        }
        return json.dumps(
            {"format": _FORMAT, "boot": self.boot, "uploaded": self.uploaded, "files": files},
            separators=(",", ":"),
        )

    @classmethod
    def from_json(cls, text: str) -> Index | None:
        """None for what is no index, or another format's: then every file is read again."""
        try:
            table = json.loads(text)
            if table["format"] != _FORMAT:
                return None
            files = {
                path: Known(size, mtime_ns, ctime_ns, inode, tuple(chunks), racy)
                for path, (size, mtime_ns, ctime_ns, inode, chunks, racy) in table["files"].items()
            }
            return cls(table["boot"], table["uploaded"], files)
        except (ValueError, KeyError, TypeError, AttributeError):
            return None


@cache
def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
