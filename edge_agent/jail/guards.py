"""Holds up whoever opens a file of a jail whose content is not here yet.

What must hold: from the answer to `guard` to `release`, no process of the jail has opened the file, by
whatever name, or mapped it; init and the file service may, which the agent can't steer. It needs no trust in
the daemon: only a file that belongs to the jail's own uids can be guarded, which nobody else depends on.

How it can fail: the kernel can't (OSError: then there is no laziness); the daemon ends, and nobody will
release: the jail is ended too. When the *jailer* is killed the kernel lets the openers through, to a file of
zeros, in the moment in which they are killed as well; what they make of it is committed by nobody, since the
daemon, once it has frozen a jail with guarded files for a commit, asks the jailer whether it lives.
truncate(2) by path opens nothing: who fills finds out. A file that has lost its last name has lost its mark,
too, so who kept an O_PATH descriptor of it reads zeros: it is in no state any more. Guarded files take a
descriptor each, and so do those who wait: of a jail there are at most _FILES and _WAITING, and of all jails
as many of each as a quarter of our descriptors. Beyond that no file is guarded, and the jail of which most
wait is ended.

Method: fanotify permission events on inodes (`man 7 fanotify`), which need CAP_SYS_ADMIN. There is one group
for all jails, never closed: that would wait for all who wait in it, and they may be frozen. Its marks are
bounded by us alone, not by fs.fanotify.max_user_marks, which others may use up.
"""

from __future__ import annotations

import logging
import os
import resource
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

_FILES = 1024  # guarded at a time, in one jail
_WAITING = 1024  # opens of one jail, whose processes may have ended meanwhile


@dataclass(slots=True)
class _Of:
    """A jail that has guarded files, `inodes`. `waiting`: how many opens of all of them."""

    cell: Cell
    inodes: set[int] = field(default_factory=set)
    waiting: int = 0


@dataclass(slots=True)
class _Guarded:
    """A file of a jail. `fd` is ours. `waiting`: who wants to open it, a descriptor of ours and a process."""

    of: _Of
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
        self._jails: dict[str, _Of] = {}  # by id; none without guarded files
        self._waiting = 0  # opens of all jails

    def has(self, cell: Cell) -> bool:
        """Does it have a file that was not released?"""
        return cell.jail_id in self._jails

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
        if of := self._jails.get(cell.jail_id):
            for inode in list(of.inodes):
                self._release(inode)

    def _inode(self, cell: Cell, fd: int) -> int:
        status = os.fstat(fd)
        own = (self._config.agent_uid(cell.slot), self._config.init_uid(cell.slot))
        if not stat.S_ISREG(status.st_mode) or status.st_uid not in own:
            raise Refused(f"that is no file of jail {cell.jail_id}")
        return status.st_ino

    def _guard(self, cell: Cell, inode: int, fd: int) -> None:
        of = self._jails.get(cell.jail_id) or _Of(cell)
        if len(of.inodes) >= _FILES:
            raise Refused(f"{_FILES} files of jail {cell.jail_id} are guarded already")
        if len(self._guarded) >= (most := _most_of_all()):
            raise Refused(f"{most} files of this node's jails are guarded already")
        if self._group is None:
            group = self._group = _Group(kernel.watch_opens())
            self._loop.watch(group, lambda: self._hear(group))
        guarded = _Guarded(of, os.dup(fd))
        try:
            kernel.mark_file(self._group.fd, guarded.fd, marked=True)
        except OSError:
            os.close(guarded.fd)
            raise
        self._guarded[inode] = guarded
        of.inodes.add(inode)
        self._jails[cell.jail_id] = of

    def _hear(self, group: _Group) -> None:
        for fd, pid in kernel.waiting_opens(group.fd):
            if fd < 0:
                continue  # the kernel has refused it
            inode = os.fstat(fd).st_ino
            guarded = self._guarded.get(inode)
            if guarded is None or pid in (guarded.of.cell.pid, self._files()):
                group.allow(fd)
                continue
            if not guarded.waiting:
                self._tell({"event": "opening", "jail_id": guarded.of.cell.jail_id, "inode": inode})
            guarded.waiting[fd] = pid
            self._count(guarded, 1)
            if guarded.of.waiting > _WAITING:
                self._thin_out(guarded.of, group)
            elif self._waiting > _most_of_all():
                self._thin_out(max(self._jails.values(), key=lambda of: of.waiting), group)

    def _thin_out(self, of: _Of, group: _Group) -> None:
        """Forgets who was killed while it waited; if that was nobody, the jail must end."""
        before = of.waiting
        for guarded in map(self._guarded.__getitem__, of.inodes):
            for fd in [fd for fd, pid in guarded.waiting.items() if not kernel.exists(pid)]:
                del guarded.waiting[fd]
                self._count(guarded, -1)
                group.allow(fd)
        if of.waiting == before:
            log.warning("jail %s is ended: %d opens of it wait for files", of.cell.jail_id, of.waiting)
            self._end(of.cell)

    def _count(self, guarded: _Guarded, opens: int) -> None:
        guarded.of.waiting += opens
        self._waiting += opens

    def _release(self, inode: int) -> None:
        guarded = self._guarded.pop(inode, None)
        if guarded is None or self._group is None:
            return
        with suppress(FileNotFoundError):  # it went with the file's last name
            kernel.mark_file(self._group.fd, guarded.fd, marked=False)
        os.close(guarded.fd)
        self._count(guarded, -len(guarded.waiting))
        for waiting in guarded.waiting:
            self._group.allow(waiting)
        guarded.of.inodes.discard(inode)
        if not guarded.of.inodes:
            del self._jails[guarded.of.cell.jail_id]


def _most_of_all() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft // 4
