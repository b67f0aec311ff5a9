"""Operations as data: they can be printed, and are carried out in order.

What must hold: a refusal by the kernel becomes PlanFailed, which names the operation and says what to do;
each operation is told before it begins, by whichever process carries it out, and none of that is lost.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from edge_agent.jail.protocol import Refused


class Operation(Protocol):
    def describe(self) -> str: ...

    def execute(self) -> None:
        """OSError if the kernel refuses."""
        ...


class PlanFailed(Refused):
    """An operation that the kernel refused."""

    def __init__(self, operation: Operation, error: OSError) -> None:
        number = error.errno or 0
        why = os.strerror(number)
        more = f": {error.strerror}" if error.strerror not in (None, why) else ""
        super().__init__(
            f"{operation.describe()}: {why} ({errno.errorcode.get(number, number)}){more}",
            _HINTS.get(number, "see the node's log; is it the newest kernel of this system?"),
        )


_MAX_PROGRESS = 64 << 10  # bytes
_HINTS = {
    errno.EPERM: "the node needs all of root's capabilities: start a container with --privileged, "
    "and a unit without CapabilityBoundingSet",
    errno.EACCES: "a security module (AppArmor, SELinux) may forbid it: see the kernel's log",
    errno.ENOENT: "something that this operation names is missing on this machine",
    errno.ENODEV: "it is there, but is no device: look at [devices] in the node's edge.toml",
    errno.ENOSPC: "a disk is full, or a limit of the kernel is reached: make room, or raise fs.mount-max and "
    "user.max_*_namespaces",
    errno.EAGAIN: "there are too many processes: raise kernel.pid_max, or the limits that the node runs with",
    errno.ENOMEM: "the machine has no memory left for another jail: give the node a smaller [capacity]",
    errno.EMFILE: "the node has too many files open: raise its limit (LimitNOFILE of a unit)",
    errno.ECHILD: "try again",
    errno.ESRCH: "a process of the jail ended meanwhile: try again, and see the node's log",
    errno.ENOSYS: "Linux 5.12 or later is needed",
    errno.EINVAL: "Linux 5.12 or later is needed, with a root filesystem that is no initramfs",
    errno.ELOOP: "a symlink is in a place where the node allows none",
}


def carry_out(
    plan: Sequence[Operation], progress: Callable[[Operation], None] = lambda operation: None
) -> None:
    """Executes the operations in order; tells `progress` each before it begins."""
    for operation in plan:
        progress(operation)
        try:
            operation.execute()
        except OSError as error:
            raise PlanFailed(operation, error) from error


class Progress:
    """What the makers of walls have done and are at, told to their jailer through a file in memory, which
    they share: a line for each operation, with who does it. Owns `fd`."""

    def __init__(self, fd: int, who: str = "jailer") -> None:
        self.fd = fd
        self._who = who

    @classmethod
    def begin(cls) -> Progress:
        fd = os.memfd_create("progress", os.MFD_CLOEXEC)
        # Its offset is shared by all who write, and not locked by the kernel as that of an opened file is:
        # without this, two who write at once write over each other.
        fcntl.fcntl(fd, fcntl.F_SETFL, os.O_APPEND)
        return cls(fd)

    def note(self, operation: Operation) -> None:
        os.write(self.fd, f"{self._who}: {operation.describe()}\n".encode())

    def lines(self) -> list[str]:
        return os.pread(self.fd, _MAX_PROGRESS, 0).decode(errors="replace").splitlines()

    def read(self) -> str:
        """The last line; empty if there is none."""
        return (self.lines() or [""])[-1]

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1


@dataclass(frozen=True, slots=True)
class Do:
    """A step that is more than the mount tree, such as leaving a namespace."""

    what: str
    action: Callable[[], object]

    def describe(self) -> str:
        return self.what

    def execute(self) -> None:
        self.action()
