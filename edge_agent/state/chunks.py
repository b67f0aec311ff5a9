"""The node's own copies of chunks, so that most restores and rollbacks need no network."""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from io import BufferedWriter
from pathlib import Path

from shared.content import Blob, is_hash
from shared.errors import RoostError

SIZE = 8 << 30  # bytes that are kept, if nobody says otherwise
# Seconds for which a chunk that was used stays, however little room there is. A turn's changes lie here from
# its capture until the blob store has them, which edge_agent.commits gives up after less than half of that.
IN_USE = 900.0
PERIOD = 60.0  # seconds between looks whether there is too much

_LEFT = 0.9  # of what may be kept, when there was more: so that it takes a while until the next time
_RECENT = ".recent"
_MOST_RECENT = 8 << 20  # compressed bytes that wait to become files


class ChunkStore:
    """A cache of blobs in `directory`, which is made if need be. Synchronous; safe for threads, but for one
    process.

    What must hold: `get` returns what was put or nothing. Each read verifies, and what fails is deleted, so
    a half-written, bit-flipped or power-cut chunk is merely fetched again. That is why nothing is synced
    here: durability is the blob store's promise, and a commit is published only after it has everything.
    How it can fail: OSError, when the disk is full or broken.

    Beyond `most_bytes` the least recently used go (`tidy`), but none that was used within `in_use` seconds.
    When one was used is its file's time, so that a million of them take no memory. A clock that is set
    forward may thus cost a chunk that is being committed; then that turn is not, and says so.

    To make a file may have to wait for a disk on which others sync. So what a user waits for is put by
    `note`: into memory, and at the end of one file, from where the next process takes what this one did not
    come to `settle`.
    """

    def __init__(
        self,
        directory: Path,
        most_bytes: int = SIZE,
        in_use: float = IN_USE,
        clock_unix: Callable[[], float] = time.time,
    ) -> None:
        self._directory = directory
        self._most_bytes = most_bytes
        self._in_use = in_use
        self._clock_unix = clock_unix
        self._lock = threading.Lock()
        self._tidying = threading.Lock()
        self._known_bytes: int | None = None  # nobody has looked yet
        self._put_bytes = 0  # since then
        directory.mkdir(parents=True, exist_ok=True)
        self._recent: dict[str, Blob] = {}
        self._log: BufferedWriter | None = None
        self._absorb()

    def missing(self, hashes: Iterable[str]) -> set[str]:
        """Those of which there is no copy. One that is there may still prove corrupt when read."""
        absent = set()
        for hash in hashes:
            with self._lock:  # who is told that it is here relies on it
                if hash not in self._recent and not self._use(self._path(hash)):
                    absent.add(hash)
        return absent

    def get(self, hash: str) -> Blob | None:
        if (recent := self._recent.get(hash)) is not None:
            return recent
        path = self._path(hash)
        try:
            blob = Blob.verified(hash, path.read_bytes())
        except FileNotFoundError:
            return None
        except RoostError:
            path.unlink(missing_ok=True)
            return None
        with suppress(OSError):  # it is whole all the same
            self._use(path)
        return blob

    def put(self, blob: Blob) -> None:
        path = self._path(blob.hash)
        temporary = path.with_name(f".{blob.hash}-{secrets.token_hex(4)}")
        try:
            try:
                temporary.write_bytes(blob.zstd)
            except FileNotFoundError:
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary.write_bytes(blob.zstd)
            os.rename(temporary, path)
            self._put_bytes += len(blob.zstd)  # twice, if it was there: then somebody looks too soon
        except OSError:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise

    def note(self, blobs: Sequence[Blob]) -> None:
        """As `put`, of a few small ones. Somebody should `settle` before long."""
        with self._lock:
            much = sum(len(blob.zstd) for blob in self._recent.values()) > _MOST_RECENT
            if not much:
                self._log = self._log or (self._directory / _RECENT).open("ab")
                self._log.write(b"".join(map(_line, blobs)))
                self._log.flush()
                self._recent |= {blob.hash: blob for blob in blobs}
        if much:
            for blob in blobs:
                self.put(blob)

    def settle(self) -> None:
        """Makes files of what was noted."""
        noted = list(self._recent.values())
        for blob in noted:
            self.put(blob)
        with self._lock:
            for blob in noted:
                self._recent.pop(blob.hash, None)
            if not self._recent and self._log is not None:
                self._log.truncate(0)

    def _absorb(self) -> None:
        """What the last process noted. A half of a line, after a power cut, is as good as none."""
        log = self._directory / _RECENT
        with suppress(FileNotFoundError):
            for line in log.read_bytes().splitlines():
                hash, _, zstd = line.partition(b" ")
                with suppress(RoostError, ValueError, OSError):
                    self.put(Blob.verified(hash.decode(), bytes.fromhex(zstd.decode())))
            log.unlink()

    def tidy(self) -> None:
        """Removes what is too much. Somebody should call it every PERIOD."""
        there = self._known_bytes
        if there is not None and there + self._put_bytes <= self._most_bytes:
            return
        if self._tidying.acquire(blocking=False):
            try:
                self._tidy()
            finally:
                self._tidying.release()

    def _tidy(self) -> None:
        """In two looks at all that there is: how old it is, and then which is old."""
        self._put_bytes = 0
        now = self._clock_unix()
        by_age: Counter[int] = Counter()  # bytes, by the second in which they were last used
        for name, path, status in self._found():
            if is_hash(name):
                if status.st_mtime > now:  # the clock was set back: else it would stay until then
                    self._use(path)
                by_age[int(min(status.st_mtime, now))] += status.st_size
            elif status.st_mtime < now - IN_USE:
                path.unlink(missing_ok=True)  # an unfinished write
        left = by_age.total()
        before = 0
        for second in sorted(by_age) if left > self._most_bytes else ():
            if left <= self._most_bytes * _LEFT or second >= now - self._in_use:
                break
            left -= by_age[second]
            before = second + 1
        for name, path, _ in self._found() if before else ():
            with self._lock, suppress(FileNotFoundError):  # nobody is told meanwhile that it is here
                if is_hash(name) and path.stat().st_mtime < before:
                    path.unlink()
        self._known_bytes = left

    def _found(self) -> Iterator[tuple[str, Path, os.stat_result]]:
        for shard in os.scandir(self._directory):
            for item in os.scandir(shard.path) if shard.is_dir(follow_symlinks=False) else ():
                with suppress(FileNotFoundError):
                    yield item.name, Path(item.path), item.stat(follow_symlinks=False)

    def _use(self, path: Path) -> bool:
        """False: it is not there."""
        now = self._clock_unix()
        try:
            os.utime(path, (now, now))
        except FileNotFoundError:
            return False
        return True

    def _path(self, hash: str) -> Path:
        if not is_hash(hash):  # a hash becomes a path
            raise ValueError(f"{hash!r} is no hash")
        return self._directory / hash[:2] / hash


def _line(blob: Blob) -> bytes:
    return f"{blob.hash} {blob.zstd.hex()}\n".encode()
