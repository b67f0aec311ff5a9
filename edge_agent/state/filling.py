"""Large files that come after the first turn: placeholders of the right size, which are filled in the
background, and at once when somebody opens one.

What must hold: nobody in the jail sees a placeholder's content, since whoever opens one waits until it is
filled (`Guard`); a snapshot takes its chunks from here, unread; an index calls it racy, so that nothing ever
takes what lies there for content. What is filled is verified, as in any restore.

How it can fail: a chunk can't be had (RESTORE_INCOMPLETE, or, when the store is out of reach for long, what
that says), or the agent has changed the file by its path, by truncate(2) or utimes(2), which open nothing
(STATE_CHANGED; one that cuts it, makes it as long as before and sets its time back may fool only itself).
Whoever runs this then ends the jail: the committed version is as it was.
"""

from __future__ import annotations

import asyncio
import os
import resource
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from edge_agent.state.files import Entry, Files, Kind
from edge_agent.state.index import Index, Known, boot_id
from edge_agent.state.source import AT_ONCE, Source, incomplete
from edge_agent.state.threads import in_thread
from shared.content import Blob
from shared.errors import Reason, Remedy, RoostError
from shared.manifest import FileNode

FROM_BYTES = 32 << 20  # to be written in all: below it takes less time than a turn
LARGE = 1 << 20  # bytes of a file from which on it can wait
_MOST = 1024  # placeholders of an instance: each takes a descriptor of three processes


class Guard(Protocol):
    """See `Jail`."""

    async def guard(self, fd: int, opening: Callable[[], None]) -> None: ...

    async def release(self, fd: int) -> None: ...


@dataclass(eq=False, slots=True)
class _Placeholder:
    """`done`: how many of its chunks were written. `wanted`: somebody waits for it."""

    node: FileNode
    fd: int
    inode: int
    mtime_ns: int = 0
    done: int = 0
    wanted: bool = False


def choose(nodes: Sequence[FileNode], most: int = _MOST, from_bytes: int = FROM_BYTES) -> list[FileNode]:
    """Which of the files that are to be written can come later: the largest, but no programs. What we have
    open for writing can't be executed."""
    if sum(node.size for node in nodes) < from_bytes:
        return []
    large = [node for node in nodes if node.size >= LARGE and not node.mode & 0o111]
    return sorted(large, key=lambda node: node.size, reverse=True)[: min(most, _MOST)]


class Lanes:
    """What all fillings of a node share: how many slices are fetched at a time, in memory, for who waits and
    in the background; how many more placeholders there may be, `room`."""

    def __init__(
        self,
        room: int | None = None,
        from_bytes: int = FROM_BYTES,
        pause: float = 1.0,
        patience: float = 30.0,
    ) -> None:
        """`room`: by default a quarter of the descriptors that this process may have. `from_bytes`: see
        `choose`. A store is asked again every `pause` seconds for what can't be fetched, for `patience`
        seconds."""
        self._waiting, self._background = asyncio.Semaphore(4), asyncio.Semaphore(2)
        self.from_bytes, self.pause, self.patience = from_bytes, pause, patience
        self.room = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4 if room is None else room

    def of(self, one: _Placeholder) -> asyncio.Semaphore:
        return self._waiting if one.wanted else self._background


class Filling:
    """Of one tree. `choose`, `place` each, then `run`; `close` it in the end. While `quiet` is held nothing
    is written."""

    def __init__(self, files: Files, guard: Guard, source: Source, lanes: Lanes) -> None:
        self.quiet = asyncio.Lock()
        self.filled_ns = 0  # the latest time that we have set on a file here (its ctime)
        self._files = files
        self._guard = guard
        self._source = source
        self._lanes = lanes
        self._taken = 0  # of the room of all
        self._placeholders: dict[int, _Placeholder] = {}  # by inode
        self._filled = Index(boot_id(), uploaded=True)
        self._changed = asyncio.Event()  # set, and taken over by another, when one is filled
        self._over = False

    @property
    def unfinished(self) -> bool:
        return bool(self._placeholders)

    def choose(self, nodes: Sequence[FileNode]) -> list[FileNode]:
        """Those that are to come later: for them there is room, until they are filled."""
        chosen = choose(nodes, self._lanes.room, self._lanes.from_bytes)
        self._take(len(chosen))
        return chosen

    def _take(self, room: int) -> None:
        self._taken += room
        self._lanes.room -= room

    async def place(self, node: FileNode) -> Known:
        """JAIL_FAILED if this machine can't hold up who opens a file: then nothing can come later."""
        fd = await self._files.open_write(node.path)
        try:
            os.ftruncate(fd, node.size)
            one = _Placeholder(node, fd, os.fstat(fd).st_ino)
            await self._guard.guard(fd, lambda: self._want(one))
            made = await self._files.commit_write(
                Entry(node.path, Kind.FILE, node.mode, mtime_ns=node.mtime_ns), more=True
            )
        except BaseException:
            with suppress(Exception):  # it may not be guarded
                await self._guard.release(fd)
            os.close(fd)
            raise
        self._placeholders[one.inode] = one
        one.mtime_ns, self.filled_ns = made.mtime_ns, max(self.filled_ns, made.ctime_ns)
        return Known.of(made, node.chunks, racy=True)

    def known(self, entry: Entry) -> Known | None:
        """What it is, if it is a placeholder, by whatever name, or was filled and looks as it did then.
        STATE_CHANGED for a placeholder that was."""
        one = self._placeholders.get(entry.inode)
        if one is not None and entry.kind is Kind.FILE:
            _check_unchanged(one, entry.size, entry.mtime_ns)
            return Known.of(entry, one.node.chunks, racy=True)
        content = self._filled.knows(entry)
        return None if content is None else Known.of(entry, content, racy=False)

    @property
    def waited_for(self) -> str:
        """The path of one for which somebody waits; "" if nobody does."""
        return next((one.node.path for one in self._placeholders.values() if one.wanted), "")

    async def served(self) -> None:
        """Returns when nobody waits, or nothing will be filled any more."""
        while self.waited_for and not self._over:
            await self._changed.wait()

    async def run(self) -> None:
        """Returns when all is filled."""
        try:
            while self._placeholders:
                wanted = (one for one in self._placeholders.values() if one.wanted)
                await self._some(next(wanted, None) or next(iter(self._placeholders.values())))
        finally:
            self._over = True
            self._changed.set()

    async def abandon(self) -> None:
        """Before anything is filled: nobody is to wait for any of them."""
        for one in self._placeholders.values():
            with suppress(Exception):  # the jail may be gone
                await self._guard.release(one.fd)
        self.close()

    def close(self) -> None:
        """`run` must have ended. Idempotent."""
        for one in self._placeholders.values():
            os.close(one.fd)
        self._placeholders.clear()
        self._take(-self._taken)

    def _want(self, one: _Placeholder) -> None:
        one.wanted = True

    async def _some(self, one: _Placeholder) -> None:
        node = one.node
        if os.fstat(one.fd).st_nlink == 0 and not one.wanted:  # nobody will ever come to it
            async with self.quiet:
                await self._files.written(node.path, one.mtime_ns, more=False)
                await self._drop(one)
            return
        blobs = await self._fetch(one)
        async with self.quiet:
            before = os.fstat(one.fd)
            _check_unchanged(one, before.st_size, before.st_mtime_ns)
            await in_thread(_append, one.fd, blobs)
            one.done += len(blobs)
            more = one.done < len(node.chunks)
            entry = await self._files.written(node.path, node.mtime_ns, more)
            one.mtime_ns, self.filled_ns = entry.mtime_ns, entry.ctime_ns
            if not more:
                await self._finish(one, entry)

    async def _finish(self, one: _Placeholder, entry: Entry) -> None:
        size = one.node.size
        if os.lseek(one.fd, 0, os.SEEK_CUR) != size:
            raise incomplete(one.node, f"its chunks do not make {size} bytes")
        if entry.size != size or os.lseek(one.fd, 0, os.SEEK_HOLE) != size:
            raise _changed(one)
        self._filled.files[one.node.path] = Known.of_untouched(entry, one.node.chunks)
        await self._drop(one)

    async def _drop(self, one: _Placeholder) -> None:
        await self._guard.release(one.fd)
        del self._placeholders[one.inode]
        os.close(one.fd)
        self._take(-1)
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _fetch(self, one: _Placeholder) -> list[Blob]:
        hashes = one.node.chunks[one.done : one.done + AT_ONCE]
        loop = asyncio.get_running_loop()
        until = loop.time() + self._lanes.patience
        while True:
            try:
                async with self._lanes.of(one):
                    return await self._source.some(one.node, hashes)
            except RoostError as error:
                if error.remedy is not Remedy.RETRY or loop.time() > until:
                    raise
            await asyncio.sleep(self._lanes.pause)


def _append(fd: int, blobs: Sequence[Blob]) -> None:
    for blob in blobs:
        view = memoryview(blob.plain)
        while view:
            view = view[os.write(fd, view) :]


def _check_unchanged(one: _Placeholder, size: int, mtime_ns: int) -> None:
    if (size, mtime_ns) != (one.node.size, one.mtime_ns):
        raise _changed(one)


def _changed(one: _Placeholder) -> RoostError:
    return RoostError(
        Reason.STATE_CHANGED,
        f"{one.node.path!r} in /state was changed without being opened, before its content had come here",
        "send the turn again: then all is here before it begins",
    )
