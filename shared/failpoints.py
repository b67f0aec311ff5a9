"""Named places in the commit path at which a test can kill, stop, slow or fail the process that gets there.

A daemon calls `failpoint("node.commit.answered")` as it gets there.

Always true: unless the process was started with ROOST_FAILPOINTS=DIRECTORY, a failpoint is one comparison and
does nothing. With it, a failpoint does what the file DIRECTORY/NAME says, once: the file is gone before it
acts, so whoever put it there sees that it was reached. The file holds one of

    kill                SIGKILL to the own process
    stop                SIGSTOP to the own process; whoever armed it sends SIGCONT
    sleep SECONDS       the whole process stands still for that long, its event loop too
    raise REASON        a RoostError with this reason

How it can fail: two tests on one directory take each other's files; so each process has its own. Why these
may be in what runs at users': docs/decisions/0022-faults.md.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path

from shared.errors import Reason, RoostError

log = logging.getLogger(__name__)

VARIABLE = "ROOST_FAILPOINTS"

_directory: Path | None = None


def enable(environment: Mapping[str, str]) -> None:
    """Called by each daemon as it starts. OSError if the directory can't be made."""
    global _directory  # noqa: PLW0603  # a process has it or not, from its start to its end
    named = environment.get(VARIABLE)
    _directory = Path(named) if named else None
    if _directory is not None:
        _directory.mkdir(parents=True, exist_ok=True)
        log.warning("failpoints are on, by %s=%s: this is a test", VARIABLE, named)


def failpoint(name: str) -> None:
    if _directory is not None:
        _reached(_directory / name)


def _reached(file: Path) -> None:
    try:
        action, _, argument = file.read_text().strip().partition(" ")
        file.unlink()
    except FileNotFoundError:
        return
    log.warning("failpoint %s: %s %s", file.name, action, argument)
    match action:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "sleep":
            time.sleep(float(argument))
        case "raise":
            raise RoostError(Reason(argument), f"failpoint {file.name} was told to fail", "this is a test")
        case _:
            raise ValueError(f"failpoint {file.name} can't {action!r}")
