"""Runs every hazard, each in a process of its own, and tells what became of it.

Prints one JSON object, {hazard: [held, what happened]}. In a jail of Roost's, an agent returns `report()`.
"""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import sys
from collections.abc import Sequence

from . import kernel, surroundings  # noqa: F401  (they fill HAZARDS)
from .attempts import HAZARDS, Attempt

_PATIENCE = 15.0  # seconds for one hazard
Outcome = tuple[bool, str]


def outcome_of(attempt: Attempt) -> Outcome:
    """In a child: some of them end whoever makes them."""
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(readable)
        os.setpgid(0, 0)
        os.environ["PROBE_OWN_FD"] = str(writable)
        os.write(writable, json.dumps(_try(attempt)).encode())
        os._exit(0)
    os.close(writable)
    ready, _, _ = select.select([readable], [], [], _PATIENCE)
    told = os.read(readable, 65536) if ready else b""
    os.close(readable)
    if not ready:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if told:
        held, text = json.loads(told)
        return held, text
    return (
        True,
        "no answer" if not ready else f"killed by {signal.Signals(-code).name}" if code < 0 else "died",
    )


def _try(attempt: Attempt) -> Outcome:
    try:
        got = attempt()
    except OSError as error:
        return True, errno.errorcode.get(error.errno or 0, str(error))
    except BaseException as error:
        return True, type(error).__name__
    return (True, "nothing there") if got is None else (False, got)


def report(wanted: Sequence[str] = ()) -> dict[str, Outcome]:
    """All hazards, or those that are `wanted`."""
    return {name: outcome_of(HAZARDS[name]) for name in wanted or HAZARDS}


if __name__ == "__main__":
    print(json.dumps(report(sys.argv[1:])))
