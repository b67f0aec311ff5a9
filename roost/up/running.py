"""One `roost up` at a time: claiming the machine, finding what runs, clearing what a killed one left."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from roost.up import record
from roost.up.processes import started_at, stop
from roost.up.record import Record
from shared.errors import Reason, RoostError

# Of the machine and not of the data directory: two meshes here would give their jails the same uids.
LOCK = Path("/run/lock/roost-up.lock")
_STOP_TIMEOUT = 60.0  # for `roost up`, which itself has deadlines for what it runs
_STRAY_TIMEOUT = 15.0


@contextmanager
def only_one(lock: Path = LOCK) -> Iterator[None]:
    """Holds the machine's one place for a mesh. BAD_REQUEST if another process has it.

    The lock goes with the process that holds it, however that ends.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(fd, 200, 0).decode(errors="replace").strip()
            raise RoostError(
                Reason.BAD_REQUEST,
                f"a mesh runs on this machine already ({holder})",
                "`roost status` shows it, `roost down` stops it",
            ) from error
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"roost up, process {os.getpid()}".encode(), 0)
        yield
    finally:
        os.close(fd)


def running(data: Path) -> Record | None:
    """What runs with its data in `data`, if anything does."""
    found = record.read(data)
    return found if found is not None and started_at(found.pid) == found.started else None


def take_down(data: Path) -> bool:
    """Stops the mesh of `data`, or what is left of a killed one. False: there was nothing to stop."""
    found = record.read(data)
    if found is None:
        return False
    stopped = stop(found.pid, found.started, _STOP_TIMEOUT)
    stopped |= clear_strays(found)
    record.remove(data)
    return stopped


def clear_strays(found: Record) -> bool:
    """Stops what a `roost up` that is gone has left running. True if there was something."""
    strays = [stop(p.pid, p.started, _STRAY_TIMEOUT) for p in reversed(found.processes)]
    return any(strays)
