"""`Turn.wake_at`: turns that an agent has itself started later. Like agent.py it is bound into jails:
standard library alone, Python 3.9.

    agent -> node   {"kind": "timer", "id", "name", "message", "at" or "after"}   in seconds
    agent -> node   {"kind": "timer", "id", "name", "cancel": true}

They count if the turn is committed; there are no answers.
"""

from __future__ import annotations

import math
from datetime import datetime
from typing import Any

SOONEST = 1.0  # seconds, as the mesh has it
MAX_NAME = 64  # characters, as the node has it
MAX_MESSAGE = 4 << 10  # bytes, as the node has it


def at(turn_id: str, name: str, when: datetime | float, message: str) -> dict[str, Any]:
    if isinstance(when, datetime):
        if when.tzinfo is None:
            raise ValueError(f"{when} may be anywhere: give it a time zone, as in datetime.now(timezone.utc)")
        when = when.timestamp()
    return {**_timer(turn_id, name), "message": _message(message), "at": _seconds(when)}


def after(turn_id: str, name: str, seconds: float, message: str) -> dict[str, Any]:
    if _seconds(seconds) < SOONEST:
        raise ValueError(f"a timer is due after {SOONEST:g} s at the soonest, not after {seconds:g}")
    return {**_timer(turn_id, name), "message": _message(message), "after": seconds}


def cancel(turn_id: str, name: str) -> dict[str, Any]:
    return {**_timer(turn_id, name), "cancel": True}


def _timer(turn_id: str, name: str) -> dict[str, Any]:
    if not isinstance(name, str) or not name.isprintable() or not 1 <= len(name) <= MAX_NAME:
        raise ValueError(f"a timer's name is 1 to {MAX_NAME} printable characters, not {name!r}")
    return {"kind": "timer", "id": turn_id, "name": name}


def _message(message: str) -> str:
    if not isinstance(message, str):
        raise TypeError(f"a timer's message is a str, not {type(message).__name__}")
    if len(message.encode("utf-8", "replace")) > MAX_MESSAGE:
        raise ValueError(f"a timer's message is at most {MAX_MESSAGE >> 10} KiB: keep what is long in /state")
    return message


def _seconds(value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no number of seconds")
    return value
