"""Processes of this machine, by pid and start time, so that a stranger is never signalled."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path


def started_at(pid: int) -> int | None:
    """When `pid` started, in clock ticks since boot; None if there is no such process, or only its corpse."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *fields = stat.rpartition(")")[2].split()  # the name in parentheses may hold anything
    return None if state in "ZX" else int(fields[18])


def stop(pid: int, started: int, timeout: float) -> bool:
    """SIGTERM, then after `timeout` seconds SIGKILL, for the process that is meant and no other.

    True if it was there. Returns when it is gone.
    """
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    try:
        if started_at(pid) != started:  # with the pidfd held, what is true now stays true
            return False
        for number, patience in ((signal.SIGTERM, timeout), (signal.SIGKILL, timeout)):
            try:
                signal.pidfd_send_signal(fd, number)
            except ProcessLookupError:
                return True
            if select.select([fd], [], [], patience)[0]:
                return True
        raise TimeoutError(f"process {pid} can't be killed")
    finally:
        os.close(fd)


def tail(path: Path, lines: int) -> list[str]:
    """The last lines of a log; none if there is no log."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - lines * 500))
            return file.read().decode(errors="replace").splitlines()[-lines:]
    except FileNotFoundError:
        return []


def wait_until(condition: Callable[[], bool], timeout: float) -> bool:
    """Looks every 50 ms. False if it did not come true in `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.05)
    return True
