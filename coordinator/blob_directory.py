"""A directory that blobs are put into for good.

What must hold: when `put` returns, its files are on the disk, and so are their names; no name is seen before
its bytes are there. Syncing costs far more than writing, and a disk's journal takes many files at once: so
all of a call's files are written, then all are synced, then all are renamed, then the directories are synced.
How it can fail: OSError; names that were not seen before may then be there, with the right bytes.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from shared.failpoints import failpoint

_INCOMING = "incoming"
_FORGOTTEN = 3600.0  # seconds after which what lies in _INCOMING is nobody's
_BEGIN_WRITING = 2  # SYNC_FILE_RANGE_WRITE

_sync_file_range = ctypes.CDLL(None).sync_file_range
_sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


class BlobDirectory:
    """Safe for threads, and for several processes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._synced: set[Path] = set()  # directories whose own names are on the disk

    def recover(self) -> None:
        """After a crash: completes what was renamed and not yet synced, removes what was left behind."""
        (self.path / "chunks").mkdir(exist_ok=True)
        _sync(self.path, self.path / "chunks", *(self.path / "chunks").iterdir())
        for path in (self.path / _INCOMING).glob("*"):
            with suppress(FileNotFoundError):  # another coordinator's, which renamed it just now
                if path.stat().st_mtime < time.time() - _FORGOTTEN:
                    path.unlink()

    def put(self, files: Sequence[tuple[str, bytes]]) -> None:
        """Names (`chunks/DIRECTORY/NAME`), and what is in them."""
        incoming: list[Path] = []
        try:
            (self.path / _INCOMING).mkdir(exist_ok=True)
            for _, data in files:
                incoming.append(self.path / _INCOMING / secrets.token_hex(8))
                _write(incoming[-1], data)
            _sync(*incoming)
            directories = {(self.path / name).parent for name, _ in files}
            self._make(directories)
            failpoint("coordinator.blob.before_rename")
            for temporary, (name, _) in zip(incoming, files, strict=True):
                os.rename(temporary, self.path / name)
            failpoint("coordinator.blob.renamed")
            _sync(*directories)
        except FileNotFoundError:
            self._synced.clear()  # somebody has removed one
            raise
        finally:
            for temporary in incoming:
                with suppress(OSError):  # renamed
                    os.unlink(temporary)

    def get(self, names: Sequence[str]) -> list[bytes]:
        """FileNotFoundError for the first that is not there; its `filename` ends with the name."""
        return [(self.path / name).read_bytes() for name in names]

    def _make(self, directories: set[Path]) -> None:
        """Another process may have made one, and not have synced its name yet."""
        new = directories - self._synced
        if new:
            (self.path / "chunks").mkdir(exist_ok=True)
        for directory in new:
            directory.mkdir(exist_ok=True)
        _sync(*{above for directory in new for above in (directory.parent, self.path)})
        self._synced |= new


def _write(path: Path, data: bytes) -> None:
    """And begins to bring it to the disk, so that to wait for one is to wait for all."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        _sync_file_range(fd, 0, 0, _BEGIN_WRITING)  # where there is none, the sync does it all
    finally:
        os.close(fd)


def _sync(*paths: Path) -> None:
    for path in paths:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
