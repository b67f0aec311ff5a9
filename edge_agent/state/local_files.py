"""A directory of this process as `Files`: for bundles, and for tests of what works on any `Files`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edge_agent.state.files import Entry
from edge_agent.state.threads import in_thread
from edge_agent.state.tree import Tree, TreeTooLarge, write_back_all
from shared.errors import Reason, RoostError

TOO_LARGE_HINT = "an agent's /state may have 100,000 files and 64 levels; keep many small things in SQLite"


class LocalFiles:
    """`Files` of the directory `path`, which must exist. Close it, or use it as a context manager."""

    def __init__(self, path: Path, owner: tuple[int, int] | None = None) -> None:
        self._path = path
        self._fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._tree = Tree(self._fd, owner)

    def __enter__(self) -> LocalFiles:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Drops unfinished writes. Idempotent."""
        if self._fd >= 0:
            self._tree.close()
            os.close(self._fd)
            self._fd = -1

    async def scan(self) -> list[Entry]:
        with self._translated():
            return await in_thread(self._tree.scan)

    async def changed(self, since_ns: int) -> tuple[list[Entry], dict[str, int]]:
        entries = await self.scan()
        opened = self._tree.open_changed(entries, since_ns)
        write_back_all(opened.values())
        return entries, opened

    async def open_read(self, path: str) -> int:
        with self._translated():
            return self._tree.open_read(path)

    async def open_write(self, path: str) -> int:
        with self._translated():
            return self._tree.open_write(path)

    async def commit_write(self, entry: Entry, more: bool = False) -> Entry:
        with self._translated():
            return self._tree.commit_write(entry, more)

    async def written(self, path: str, mtime_ns: int, more: bool) -> Entry:
        with self._translated():
            return self._tree.written(path, mtime_ns, more)

    async def make_dir(self, entry: Entry) -> None:
        with self._translated():
            self._tree.make_dir(entry)

    async def make_link(self, entry: Entry) -> None:
        with self._translated():
            self._tree.make_link(entry)

    async def remove(self, path: str) -> None:
        with self._translated():
            await in_thread(self._tree.remove, path)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except TreeTooLarge as error:
            raise RoostError(Reason.STATE_TOO_LARGE, f"{self._path}: {error}", TOO_LARGE_HINT) from error
        except FileNotFoundError:
            raise
        except OSError as error:
            raise RoostError(
                Reason.JAIL_FAILED, f"{self._path}: {error}", "check this node's disk and its permissions"
            ) from error
