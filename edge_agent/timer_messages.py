"""What an agent says of timers: "timer" of docs/agent-protocol.md. The last word on a name counts, and only
if the turn is committed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shared.errors import Reason, RoostError
from shared.timers import MAX_TIMERS, Setting, check_name, checked


class TurnTimers:
    """Those that a turn sets and cancels."""

    def __init__(self) -> None:
        self._asked: dict[str, Setting | None] = {}  # None: cancelled

    @property
    def settings(self) -> tuple[Setting, ...]:
        return tuple(setting for setting in self._asked.values() if setting is not None)

    @property
    def cancelled(self) -> tuple[str, ...]:
        return tuple(name for name, setting in self._asked.items() if setting is None)

    def take(self, message: Mapping[str, Any]) -> None:
        """BAD_REQUEST says what is wrong with it."""
        try:
            name, setting = _parse(message)
        except (ValueError, OverflowError) as error:
            raise _bad(str(error)) from error
        self._asked[name] = setting
        if len(self._asked) > 2 * MAX_TIMERS:
            raise _bad(f"more than {2 * MAX_TIMERS} names of timers in one turn")


def _parse(message: Mapping[str, Any]) -> tuple[str, Setting | None]:
    match message:
        case {"name": str(name), "cancel": True}:
            check_name(name)
            return name, None
        case {"name": str(name), "message": str(text), "at": int() | float() as at}:
            return name, checked(Setting(name, text, at=float(at)))
        case {"name": str(name), "message": str(text), "after": int() | float() as after}:
            return name, checked(Setting(name, text, after=float(after)))
        case _:
            raise ValueError("it needs 'name', and 'cancel', or 'message' with 'at' or 'after'")


def _bad(what: str) -> RoostError:
    return RoostError(Reason.BAD_REQUEST, f"a timer can't be set: {what}", "docs/timers.md says what may be")
