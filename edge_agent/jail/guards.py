"""Holds up whoever opens a file of a jail whose content is not here yet.

What must hold: from the answer to `guard` to `release`, no process of the jail has opened the file, by
whatever name, or mapped it; init and the file service may, which the agent can't steer. It needs no trust in
the daemon: only a file that belongs to the jail's own uids can be guarded, which nobody else depends on.

How it can fail: the kernel can't (OSError: then there is no laziness); the daemon ends, and nobody will
release: the jail is ended too. When the *jailer* is killed the kernel lets the openers through, to a file of
zeros, in the moment in which they are killed as well; what they make of it is committed by nobody, since a
commit takes a freeze, which the jailer does. truncate(2) by path opens nothing: who fills finds out. A file
that has lost its last name has lost its mark, too, so who kept an O_PATH descriptor of it reads zeros: it is
in no state any more. Those who wait take a descriptor each, so there are at most _WAITING.

Method: fanotify permission events on inodes (`man 7 fanotify`), which need CAP_SYS_ADMIN. There is one group
for all jails, never closed: that would wait for all who wait in it, and they may be frozen.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from edge_agent.jail import kernel
from edge_agent.jail.cell import Cell, Running
from edge_agent.jail.config import JailerConfig
from edge_agent.jail.loop import Loop
from edge_agent.jail.protocol import Guard, OfFile, Refused

log = logging.getLogger(__name__)

_FILES = 128  # guarded at a time, in one jail
_WAITING = 1024  # opens of one jail, whose processes may have ended meanwhile


@dataclass(slots=True)
class _Guarded:
    """A file of a jail. `fd` is ours. `waiting`: who wants to open it, a descriptor of ours and a process."""

    cell: Cell
    fd: int
    waiting: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Group:
    fd: int

    @property
    def wants_write(self) -> bool:
        return False

    def fileno(self) -> int:
        return self.fd

    def allow(self, fd: int) -> None:
        with suppress(OSError):  # it was killed meanwhile
            kernel.allow_open(self.fd, fd)
        os.close(fd)


class Guards:
    """`end` ends a jail that abuses them. `files`: the pid of the file service."""

    def __init__(
        self,
        config: JailerConfig,
        loop: Loop,
        tell: Callable[[dict[str, Any]], None],
        end: Callable[[Cell], None],
        files: Callable[[], int],
    ) -> None:
        self._files = files
        self._config = config
        self._loop = loop
        self._tell = tell
        self._end = end
        self._group: _Group | None = None
        self._guarded: dict[int, _Guarded] = {}  # by inode

    def has(self, cell: Cell) -> bool:
        """Does it have a file that was not released?"""
        return bool(self._of(cell))

    def of_file(self, cell: Cell | None, request: OfFile, fds: tuple[int, ...]) -> None:
        """Refused, or OSError if the kernel can't. The descriptor stays the caller's."""
        if cell is None or not isinstance(cell.phase, Running):
            raise Refused(f"jail {request.jail_id} does not run")
        if len(fds) != 1:
            raise Refused(f"{request.do} goes with one descriptor")
        inode = self._inode(cell, fds[0])
        if not isinstance(request, Guard):
            self._release(inode)
        elif inode not in self._guarded:
            self._guard(cell, inode, fds[0])

    def forget(self, cell: Cell) -> None:
        """Its processes have ended."""
        for inode in self._of(cell):
            self._release(inode)

    def _of(self, cell: Cell) -> list[int]:
        return [inode for inode, guarded in self._guarded.items() if guarded.cell is cell]

    def _inode(self, cell: Cell, fd: int) -> int:
        status = os.fstat(fd)
        own = (self._config.agent_uid(cell.slot), self._config.init_uid(cell.slot))
        if not stat.S_ISREG(status.st_mode) or status.st_uid not in own:
            raise Refused(f"that is no file of jail {cell.jail_id}")
        return status.st_ino

    def _guard(self, cell: Cell, inode: int, fd: int) -> None:
        if len(self._of(cell)) >= _FILES:
            raise Refused(f"{_FILES} files of jail {cell.jail_id} are guarded already")
        if self._group is None:
            group = self._group = _Group(kernel.watch_opens())
            self._loop.watch(group, lambda: self._hear(group))
        guarded = _Guarded(cell, os.dup(fd))
        try:
            kernel.mark_file(self._group.fd, guarded.fd, marked=True)
        except OSError:
            os.close(guarded.fd)
            raise
        self._guarded[inode] = guarded

    def _hear(self, group: _Group) -> None:
        for fd, pid in kernel.waiting_opens(group.fd):
            if fd < 0:
                continue  # the kernel has refused it
            inode = os.fstat(fd).st_ino
            guarded = self._guarded.get(inode)
            if guarded is None or pid in (guarded.cell.pid, self._files()):
                group.allow(fd)
                continue
            if not guarded.waiting:
                self._tell({"event": "opening", "jail_id": guarded.cell.jail_id, "inode": inode})
            guarded.waiting[fd] = pid
            self._check(guarded.cell, group)

    def _check(self, cell: Cell, group: _Group) -> None:
        """Forgets who was killed while it waited, when there are many."""
        guarded = [self._guarded[inode] for inode in self._of(cell)]
        if sum(len(one.waiting) for one in guarded) <= _WAITING:
            return
        for one in guarded:
            for fd in [fd for fd, pid in one.waiting.items() if not kernel.exists(pid)]:
                del one.waiting[fd]
                group.allow(fd)
        if sum(len(one.waiting) for one in guarded) > _WAITING:
            log.warning("jail %s is ended: more than %d of it wait for files", cell.jail_id, _WAITING)
            self._end(cell)

    def _release(self, inode: int) -> None:
        guarded = self._guarded.pop(inode, None)
        if guarded is None or self._group is None:
            return
        with suppress(FileNotFoundError):  # it went with the file's last name
            kernel.mark_file(self._group.fd, guarded.fd, marked=False)
        os.close(guarded.fd)
        for waiting in guarded.waiting:
            self._group.allow(waiting)
