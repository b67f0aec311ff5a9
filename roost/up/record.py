"""up.json: what runs, so that `down`, `logs` and clients find it. Written at once or not at all."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path

from roost._where import RECORD_NAME

_FORMAT = 1


@dataclass(frozen=True, slots=True)
class ProcessRecord:
    """A process is known by its pid and by when it started (clock ticks since boot): pids are used again."""

    name: str
    pid: int
    started: int
    address: str
    log: str


@dataclass(frozen=True, slots=True)
class Record:
    pid: int  # of `roost up` itself
    started: int
    coordinators: tuple[str, ...]
    processes: tuple[ProcessRecord, ...]
    format: int = _FORMAT


def write(data: Path, record: Record) -> None:
    path = data / RECORD_NAME
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(dataclasses.asdict(record), indent=2) + "\n")
    os.replace(temporary, path)


def read(data: Path) -> Record | None:
    """None if nothing was written, or not by this version."""
    try:
        raw = json.loads((data / RECORD_NAME).read_text())
        if raw["format"] != _FORMAT:
            return None
        return Record(
            raw["pid"],
            raw["started"],
            tuple(raw["coordinators"]),
            tuple(ProcessRecord(**process) for process in raw["processes"]),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remove(data: Path) -> None:
    (data / RECORD_NAME).unlink(missing_ok=True)
