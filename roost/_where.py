"""Where things are on this machine: the data of `roost up`, and the coordinators to talk to."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from shared.errors import Reason, RoostError

COORDINATORS_VARIABLE = "ROOST_COORDINATORS"
RECORD_NAME = "up.json"


def data_dir(env: Mapping[str, str] = os.environ) -> Path:
    """Where `roost up` keeps its data unless told otherwise."""
    base = env.get("XDG_DATA_HOME") or str(Path(env.get("HOME") or Path.home()) / ".local" / "share")
    return Path(base) / "roost" / "up"


def find_coordinators(given: Sequence[str] | None, env: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """The addresses `given`; else those in ROOST_COORDINATORS; else those that `roost up` wrote down.

    BAD_REQUEST if there are none, or one is no HOST:PORT.
    """
    addresses = tuple(given or ())
    if not addresses:
        addresses = tuple(
            part.strip() for part in env.get(COORDINATORS_VARIABLE, "").split(",") if part.strip()
        )
    if not addresses:
        addresses = _from_record(data_dir(env) / RECORD_NAME)
    if not addresses:
        raise RoostError(
            Reason.COORDINATOR_UNREACHABLE,
            "no coordinator is known here",
            f"start a mesh on this machine with `roost up`, or name one with --coordinator HOST:PORT "
            f"or {COORDINATORS_VARIABLE}",
        )
    for address in addresses:
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal():
            raise RoostError(
                Reason.BAD_REQUEST,
                f"{address!r} is no coordinator address",
                "write HOST:PORT, like 10.0.0.5:7400",
            )
    return addresses


def _from_record(path: Path) -> tuple[str, ...]:
    try:
        record = json.loads(path.read_text())
        return tuple(str(address) for address in record["coordinators"])
    except (OSError, ValueError, KeyError, TypeError):
        return ()  # nothing runs here, or what wrote this was cut off: the same to a client
