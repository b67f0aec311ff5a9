"""A directory's tree, touched only beneath its root. Synchronous, stdlib only: jails' inits and the
file service run it.

What must hold: whatever the tree contains or becomes meanwhile, no call reads, writes or removes anything
outside it, and none blocks. So every path is walked one component at a time from the root's descriptor,
never through a symlink and never by `..`, and only regular files are opened. How it can fail: OSError, with
FileNotFoundError for a path whose parents are missing, links or no directories; TreeTooLarge; ValueError for
a path that no tree can have, which is the caller's bug.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import secrets
import stat
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TypeVar

from edge_agent.state.files import Entry, Kind

MAX_ENTRIES = 100_000
MAX_DEPTH = 64
MAX_OPENED = 8  # files in one answer
_SLICE = 32  # entries, between two places to stop at
_MOST_LEVELS = 200  # of a tree that is only measured; each takes two descriptors
MAX_NAME_CHARS = 16 << 20  # of all paths and link targets together: they are held in memory
TEMPORARY = ".roost-tmp-"  # names that begin so are ours: unfinished writes, removed by the next scan

_WAIT_BEFORE, _WRITE = 1, 2  # SYNC_FILE_RANGE_*
_sync_file_range = ctypes.CDLL(None, use_errno=True).sync_file_range
_sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_WALK = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


T = TypeVar("T")
# What goes through a whole tree: it stops now and then, for others to go on, and returns T in the end.
InSlices = Generator[None, None, T]


def whole(work: InSlices[T]) -> T:
    """Does it without a stop."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            result: T = end.value
            return result


class TreeTooLarge(Exception):
    """The tree has more entries, levels or names than a state may have; the message says which."""


@dataclass(frozen=True, slots=True)
class _Pending:
    """A file that is being written: its directory, our own descriptor of it, its name until committed."""

    parent: int
    fd: int
    temporary: str


class Tree:
    """The tree under `root_fd`, which stays the caller's to close. What it makes belongs to `owner`, a
    (uid, gid), if given, and a file that is still to be committed to `keeper`. One caller at a time."""

    def __init__(
        self,
        root_fd: int,
        owner: tuple[int, int] | None = None,
        keeper: tuple[int, int] | None = None,
    ) -> None:
        self._root = root_fd
        self._owner = owner
        self._keeper = keeper
        self._pending: dict[str, _Pending] = {}
        self._more: dict[str, int] = {}  # our own descriptors of files in place, by their first path

    def close(self) -> None:
        """Drops unfinished writes."""
        self._drop_all_pending()
        for fd in self._more.values():
            os.close(fd)
        self._more.clear()

    def scan(self) -> list[Entry]:
        """As in `Files`. Unfinished writes, of this Tree or of one that crashed, are removed."""
        return whole(self.scanning())

    def scanning(self) -> InSlices[list[Entry]]:
        """As `scan`."""
        self._drop_all_pending()
        fd = os.open(".", _DIRECTORY, dir_fd=self._root)
        scan = _Scan()
        yield from scan.directory(fd, "", 1)
        scan.found.sort(key=lambda entry: entry.path)
        return scan.found

    def open_changed(self, entries: Sequence[Entry], since_ns: int) -> dict[str, int]:
        """See `Files.changed`, but not written back."""
        changed = [e.path for e in entries if e.kind is Kind.FILE and e.ctime_ns >= since_ns]
        opened: dict[str, int] = {}
        for path in changed[:MAX_OPENED]:
            with suppress(OSError):  # whoever opens it then is told
                opened[path] = self.open_read(path)
        return opened

    def taken(self, most_bytes: int, most_entries: int) -> InSlices[int]:
        """Bytes of the disk that the tree takes, counted until they are more than `most_bytes`. TreeTooLarge
        for more entries than `most_entries`, or levels than can be looked through."""
        fd = os.open(".", _DIRECTORY, dir_fd=self._root)
        total = entries = 0
        opened = [_begin_scan(fd)]
        try:
            while opened and total <= most_bytes:
                fd, names = opened[-1]
                item = next(names, None)
                if item is None:
                    _close_scan(*opened.pop())
                    continue
                entries += 1
                if entries % _SLICE == 0:
                    yield
                if entries > most_entries or len(opened) > _MOST_LEVELS:
                    raise TreeTooLarge(f"it has more than {most_entries:,} entries, or {_MOST_LEVELS} levels")
                with suppress(FileNotFoundError, NotADirectoryError):
                    status = os.stat(item.name, dir_fd=fd, follow_symlinks=False)
                    total += status.st_blocks * 512
                    if stat.S_ISDIR(status.st_mode):
                        below = os.open(item.name, _DIRECTORY, dir_fd=fd)
                        opened.append(_begin_scan(below))
        finally:
            for pair in opened:
                _close_scan(*pair)
        return total

    def open_read(self, path: str) -> int:
        with self._parent(path) as (parent, name):
            try:
                fd = os.open(name, _READ, dir_fd=parent)
            except OSError as error:
                # A link (ELOOP) or a socket (ENXIO): as little a file here as nothing at all.
                if not _is(stat.S_ISREG, parent, name):
                    raise _not_there(path) from error
                raise
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise _not_there(path)
        return fd

    def open_write(self, path: str) -> int:
        """A second one for the same path drops the first."""
        self._drop_pending(path)
        with self._parent(path) as (parent, _):
            temporary = _temporary_name()
            fd = os.open(temporary, _CREATE, 0o600, dir_fd=parent)
            own: list[int] = []  # the caller may close its one before the commit
            try:
                if self._keeper is not None:
                    os.fchown(fd, *self._keeper)
                own += [os.dup(parent)]
                own += [os.dup(fd)]
            except OSError:
                for each in (fd, *own):
                    os.close(each)
                os.unlink(temporary, dir_fd=parent)
                raise
            self._pending[path] = _Pending(own[0], own[1], temporary)
        return fd

    def commit_write(self, entry: Entry, more: bool = False) -> Entry:
        return whole(self.committing(entry, more))

    def committing(self, entry: Entry, more: bool) -> InSlices[Entry]:
        """As `commit_write`."""
        pending = self._pending.get(entry.path)
        if pending is None:
            raise ValueError(f"{entry.path!r} was not opened for writing")
        name = _parts(entry.path)[-1]
        try:
            self._own(pending.fd)
            os.fchmod(pending.fd, entry.mode & 0o777)
            os.utime(pending.fd, ns=(entry.mtime_ns, entry.mtime_ns))
            yield from _replace(pending.parent, pending.temporary, name)
            if entry.path in self._more:  # of a file that this one takes the place of
                os.close(self._more.pop(entry.path))
            if more:
                self._more[entry.path] = os.dup(pending.fd)
            return _entry(entry.path, Kind.FILE, os.fstat(pending.fd))
        finally:
            self._drop_pending(entry.path)

    def written(self, path: str, mtime_ns: int, more: bool) -> Entry:
        fd = self._more.get(path)
        if fd is None:
            raise ValueError(f"{path!r} is not being written to")
        os.utime(fd, ns=(mtime_ns, mtime_ns))
        entry = _entry(path, Kind.FILE, os.fstat(fd))
        if not more:
            os.close(self._more.pop(path))
        return entry

    def make_dir(self, entry: Entry) -> None:
        with self._parent(entry.path) as (parent, name):
            if not _is(stat.S_ISDIR, parent, name):
                with suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=parent)
                os.mkdir(name, 0o700, dir_fd=parent)
            fd = os.open(name, _DIRECTORY, dir_fd=parent)
            try:
                self._own(fd)
                os.fchmod(fd, entry.mode & 0o777)
            finally:
                os.close(fd)

    def make_link(self, entry: Entry) -> None:
        whole(self.linking(entry))

    def linking(self, entry: Entry) -> InSlices[None]:
        """As `make_link`."""
        with self._parent(entry.path) as (parent, name):
            temporary = _temporary_name()
            os.symlink(entry.target, temporary, dir_fd=parent)
            try:
                if self._owner is not None:
                    os.chown(temporary, *self._owner, dir_fd=parent, follow_symlinks=False)
                yield from _replace(parent, temporary, name)
            except BaseException:
                with suppress(FileNotFoundError):
                    os.unlink(temporary, dir_fd=parent)
                raise

    def remove(self, path: str) -> None:
        whole(self.removing(path))

    def removing(self, path: str) -> InSlices[None]:
        """As `remove`."""
        with suppress(FileNotFoundError):
            with self._parent(path) as (parent, name):
                yield from _remove(parent, name, 0)

    @contextmanager
    def _parent(self, path: str) -> Iterator[tuple[int, str]]:
        """The descriptor of `path`'s directory, and the name in it."""
        *directories, name = _parts(path)
        fd = os.open(".", _WALK, dir_fd=self._root)
        try:
            for directory in directories:
                try:
                    below = os.open(directory, _WALK, dir_fd=fd)
                except OSError as error:
                    if not _is(stat.S_ISDIR, fd, directory):
                        raise _not_there(path) from error
                    raise
                os.close(fd)
                fd = below
            yield fd, name
        finally:
            os.close(fd)

    def _own(self, fd: int) -> None:
        if self._owner is not None:
            os.fchown(fd, *self._owner)

    def _drop_all_pending(self) -> None:
        for path in list(self._pending):
            self._drop_pending(path)

    def _drop_pending(self, path: str) -> None:
        pending = self._pending.pop(path, None)
        if pending is None:
            return
        with suppress(
            OSError
        ):  # it was committed, or an agent put something else there: the next scan removes it
            os.unlink(pending.temporary, dir_fd=pending.parent)
        os.close(pending.fd)
        os.close(pending.parent)


class _Scan:
    """One pass over a tree, with what it has met so far."""

    def __init__(self) -> None:
        self.found: list[Entry] = []
        self._met = 0
        self._name_chars = 0

    def directory(self, fd: int, prefix: str, depth: int) -> Iterator[None]:
        """Everything under the directory `fd`, which it closes. `prefix` is "" or ends with a slash."""
        try:
            if depth > MAX_DEPTH:
                raise TreeTooLarge(f"directories are nested more than {MAX_DEPTH} deep")
            with os.scandir(fd) as names:
                for item in names:
                    self._count(len(prefix) + len(item.name))
                    if self._met % _SLICE == 0:
                        yield
                    if item.name.startswith(TEMPORARY):
                        yield from _remove(fd, item.name, depth)
                        continue
                    path = prefix + item.name
                    below = self._one(fd, item.name, path)
                    if below is not None:
                        yield from self.directory(below, path + "/", depth + 1)
        finally:
            os.close(fd)

    def _one(self, parent: int, name: str, path: str) -> int | None:
        """A descriptor of a directory, which is the caller's."""
        # Something that vanished or changed its kind since it was listed is left out, as if it had
        # never been there. A frozen jail's tree does not change.
        with suppress(FileNotFoundError, NotADirectoryError):
            status = os.stat(name, dir_fd=parent, follow_symlinks=False)
            if stat.S_ISREG(status.st_mode):
                self.found.append(_entry(path, Kind.FILE, status))
            elif stat.S_ISLNK(status.st_mode):
                target = os.readlink(name, dir_fd=parent)
                self._count(len(target), entries=0)
                self.found.append(Entry(path, Kind.LINK, 0o777, target=target))
            elif stat.S_ISDIR(status.st_mode):
                below = os.open(name, _DIRECTORY, dir_fd=parent)
                self.found.append(Entry(path, Kind.DIR, status.st_mode & 0o777))
                return below
        return None

    def _count(self, name_chars: int, entries: int = 1) -> None:
        self._met += entries
        self._name_chars += name_chars
        if self._met > MAX_ENTRIES:
            raise TreeTooLarge(f"there are more than {MAX_ENTRIES:,} files and directories")
        if self._name_chars > MAX_NAME_CHARS:
            raise TreeTooLarge(f"the paths are more than {MAX_NAME_CHARS >> 20} MiB in all")


def write_back_all(fds: Iterable[int]) -> None:
    """Whichever can't be is noticed where it is read."""
    for fd in fds:
        with suppress(OSError):
            write_back(fd)


def write_back(fd: int) -> None:
    """Starts writing the file's dirty pages, without waiting for the disk: that alone makes them clean.

    It waits only for a writing that had begun before, as its pages may have been dirtied again since.
    """
    if _sync_file_range(fd, 0, 0, _WAIT_BEFORE | _WRITE) != 0:
        os.fdatasync(fd)  # a file system without it


def _some_names(fd: int) -> list[str]:
    """The first in the directory: an agent can put any number there."""
    with os.scandir(fd) as names:
        return [item.name for item in itertools.islice(names, _SLICE)]


def _begin_scan(fd: int) -> tuple[int, os._ScandirIterator[str]]:
    """Of a directory, which is closed if it can't be read."""
    try:
        return fd, os.scandir(fd)
    except OSError:
        os.close(fd)
        raise


def _close_scan(fd: int, names: os._ScandirIterator[str]) -> None:
    names.close()
    os.close(fd)


def _entry(path: str, kind: Kind, status: os.stat_result) -> Entry:
    return Entry(
        path,
        kind,
        status.st_mode & 0o777,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
        status.st_ino,
    )


def _parts(path: str) -> list[str]:
    parts = path.split("/")
    if any(part in ("", ".", "..") or "\0" in part for part in parts):
        raise ValueError(f"{path!r} is no path within a tree")
    if parts[-1].startswith(TEMPORARY):
        raise ValueError(f"{path!r}: names that begin with {TEMPORARY} are reserved")
    return parts


def _temporary_name() -> str:
    return TEMPORARY + secrets.token_hex(8)


def _not_there(path: str) -> FileNotFoundError:
    return FileNotFoundError(2, "not there, or of another kind", path)


def _lstat(parent: int, name: str) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return None


def _is(kind: Callable[[int], bool], parent: int, name: str) -> bool:
    status = _lstat(parent, name)
    return status is not None and kind(status.st_mode)


def _replace(parent: int, temporary: str, name: str) -> InSlices[None]:
    """Moves a file or link in place of whatever has that name. A file is replaced atomically, a directory
    is removed first."""
    if _is(stat.S_ISDIR, parent, name):
        yield from _remove(parent, name, 0)
    os.rename(temporary, name, src_dir_fd=parent, dst_dir_fd=parent)


def _remove(parent: int, name: str, depth: int) -> InSlices[None]:
    """Removes `name`, with all beneath it if it is a directory. FileNotFoundError if it is not there."""
    status = os.stat(name, dir_fd=parent, follow_symlinks=False)
    if not stat.S_ISDIR(status.st_mode):
        os.unlink(name, dir_fd=parent)
        return
    if depth > MAX_DEPTH:
        raise TreeTooLarge(f"directories are nested more than {MAX_DEPTH} deep")
    fd = os.open(name, _DIRECTORY, dir_fd=parent)
    try:
        while names := _some_names(fd):
            for child in names:
                yield from _remove(fd, child, depth + 1)
            yield
    finally:
        os.close(fd)
    os.rmdir(name, dir_fd=parent)
