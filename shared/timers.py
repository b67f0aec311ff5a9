"""Timers that a turn sets: what may be asked, for node and coordinator alike."""

from __future__ import annotations

import math
from dataclasses import dataclass

from protos.v1 import timers_pb2
from shared.errors import Reason, RoostError

MAX_TIMERS = 16  # of one instance
MAX_NAME = 64  # characters
MAX_MESSAGE = 4 << 10  # bytes
SOONEST = 1.0  # seconds after the commit of the turn that sets it
LATEST = 10 * 366 * 86_400.0  # seconds from now


@dataclass(frozen=True, slots=True)
class Setting:
    """One of `at` (seconds since 1970) and `after` (seconds after the commit of the turn that sets it)."""

    name: str
    message: str
    at: float | None = None
    after: float | None = None

    def to_proto(self) -> timers_pb2.TimerSetting:
        proto = timers_pb2.TimerSetting(name=self.name, message=self.message)
        if self.at is not None:
            proto.at_unix = self.at
        elif self.after is not None:
            proto.after_seconds = self.after
        return proto

    @classmethod
    def from_proto(cls, proto: timers_pb2.TimerSetting) -> Setting:
        """BAD_REQUEST if there can be no such timer."""
        at = proto.at_unix if proto.WhichOneof("when") == "at_unix" else None
        after = proto.after_seconds if proto.WhichOneof("when") == "after_seconds" else None
        try:
            return checked(cls(proto.name, proto.message, at, after))
        except ValueError as error:
            raise RoostError(
                Reason.BAD_REQUEST, f"there can be no such timer: {error}", "docs/timers.md says what may be"
            ) from error

    def due(self, now: float) -> float:
        """In seconds since 1970, if the turn that sets it is committed `now`."""
        wanted = self.at if self.at is not None else now + (self.after or 0.0)
        return min(max(wanted, now + SOONEST), now + LATEST)


def checked(setting: Setting) -> Setting:
    """ValueError says what is wrong with it."""
    check_name(setting.name)
    if len(setting.message.encode()) > MAX_MESSAGE:
        raise ValueError(f"a timer's message is at most {MAX_MESSAGE >> 10} KiB")
    if (setting.at is None) == (setting.after is None):
        raise ValueError("a timer is due at a time, or after some seconds")
    if not all(n is None or math.isfinite(n) for n in (setting.at, setting.after)):
        raise ValueError("a timer's time is a finite number of seconds")
    return setting


def check_name(name: str) -> None:
    """ValueError."""
    if not 1 <= len(name) <= MAX_NAME or not name.isprintable():
        raise ValueError(f"a timer's name is 1 to {MAX_NAME} printable characters")
