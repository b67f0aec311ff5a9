"""Wall clocks that jump, by Debian's libfaketime. Monotonic clocks stay as they are."""

from __future__ import annotations

from pathlib import Path

_LIBRARY = next(iter(Path("/usr/lib").glob("*/faketime/libfaketime.so.1")), None)


def faked_clock(file: Path) -> dict[str, str]:
    """What goes into a process's environment, so that its wall clock is off by the seconds that `file` says
    ("+90"), within a second. Empty where there is no libfaketime."""
    if _LIBRARY is None:
        return {}
    return {
        "LD_PRELOAD": str(_LIBRARY),
        "FAKETIME_TIMESTAMP_FILE": str(file),
        "FAKETIME_CACHE_DURATION": "1",
        "DONT_FAKE_MONOTONIC": "1",
    }
