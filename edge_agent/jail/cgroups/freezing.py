"""Stops all that an agent runs, and says when it has stopped, through descriptors of its group's freezer.

The jailer opens them and gives them away (`Cgroups.open_freezer`): the kernel asks for rights when such a
file is opened, not when it is written to, so they work for the daemon, which could not open them. What must
hold: they are closed once, and never used after that. How it can fail: OSError once the group is gone.
"""

from __future__ import annotations

import os
import select

from edge_agent.jail.wire import close_all

# Processes that wait for something stop within a few switches of the processor: to look again at once, a few
# times, is sooner done than to come back.
_LOOKS, _PAUSE = 5, 50e-6
_BYTES = 256  # more than such a file ever has


class Freezing:
    """Of one jail. Owns `fds`: of v1 `freezer.state`, of v2 `cgroup.freeze` and `cgroup.events`. ValueError
    if they are fewer or more than that."""

    def __init__(self, fds: tuple[int, ...]) -> None:
        if len(fds) not in (1, 2):
            raise ValueError(f"{len(fds)} descriptors freeze nothing")
        self._fds = fds
        self._is_v1 = len(fds) == 1

    @property
    def closed(self) -> bool:
        return not self._fds

    def freeze(self) -> bool:
        """Have all stopped? If not yet, `frozen` says when they have."""
        self._write(frozen=True)
        for _ in range(_LOOKS):
            if self.frozen():
                return True
            select.select((), (), (), _PAUSE)  # time.sleep fails under a pretended clock (libfaketime)
        return False

    def frozen(self) -> bool:
        """Has a `freeze` stopped all? Call it until it says so."""
        said = os.pread(self._fds[-1], _BYTES, 0)
        if not self._is_v1:
            return b"frozen 1" in said
        if said.strip() == b"FROZEN":
            return True
        self._write(frozen=True)  # v1 looks again only when it is asked again
        return False

    def thaw(self) -> None:
        self._write(frozen=False)

    def close(self) -> None:
        """Idempotent. What is frozen stays so."""
        fds, self._fds = self._fds, ()
        close_all(fds)

    def _write(self, frozen: bool) -> None:
        if self._is_v1:
            os.pwrite(self._fds[0], b"FROZEN" if frozen else b"THAWED", 0)
        else:
            os.pwrite(self._fds[0], b"1" if frozen else b"0", 0)
