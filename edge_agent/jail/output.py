"""What an agent writes to its standard output and error: kept in part, and passed on at a bounded rate."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable
from contextlib import suppress

from edge_agent.jail.protocol import STDERR_TAIL

_CHUNK = 1 << 16
_LINE = 1000  # characters; longer ones are cut
_LEAST = 64  # bytes that a line counts for: to pass on a short one is as much work
_BYTES_A_SECOND = 16 << 10  # that a jail may add to the node's log


class Output:
    """Reads `fd`, the end of a pipe; passes whole lines to `write`, and remembers the last 4 KiB."""

    def __init__(
        self,
        fd: int,
        label: str,
        write: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        os.set_blocking(fd, False)
        self.fd = fd
        self._label = label
        self._write = write
        self._clock = clock
        self._tail = bytearray()
        self._line = bytearray()
        self._window = clock()
        self._left = _BYTES_A_SECOND
        self._dropped = 0

    @property
    def tail(self) -> str:
        return self._tail.decode(errors="replace")

    def read(self) -> int | None:
        """Takes what there is, at most 64 KiB, and says how many bytes. None when it will never be more."""
        try:
            data = os.read(self.fd, _CHUNK)
        except BlockingIOError:
            return 0
        if not data:
            return None
        self._tail = (self._tail + data[-STDERR_TAIL:])[-STDERR_TAIL:]
        size, newline = len(data), data.rfind(b"\n")
        if newline >= 0 and self._left <= 0 and self._clock() - self._window < 1.0:
            self._dropped += data.count(b"\n")  # without a look at each
            self._line.clear()
            data = data[newline + 1 :]
        *lines, rest = (self._line + data).split(b"\n")
        for number, line in enumerate(lines):
            self._pass_on(line)
            if self._left <= 0:
                self._dropped += len(lines) - number - 1
                break
        self._line = bytearray(rest[-_CHUNK:])
        return size

    def drain(self) -> None:
        """Takes what there is at the end, though a process that holds the pipe may write on."""
        for _ in range(4):
            if not self.read():
                break
        if self._line:
            self._pass_on(self._line)
            self._line.clear()

    def _pass_on(self, line: bytearray) -> None:
        now = self._clock()
        if now - self._window >= 1.0:
            if self._dropped:
                self._write(
                    f"[{self._label}] ({self._dropped} lines of output left out: too many a second)\n"
                )
            self._window, self._left, self._dropped = now, _BYTES_A_SECOND, 0
        if self._left <= 0:
            self._dropped += 1
            return
        self._left -= max(_LEAST, min(len(line), _LINE) + 1)
        # An agent must not be able to steer the terminal of whoever reads the log.
        text = line.decode(errors="replace")[:_LINE]
        self._write(f"[{self._label}] {''.join(c if c.isprintable() else '·' for c in text)}\n")


def to_stderr(text: str) -> None:
    """Writes to standard error unless that would block: a log that nobody reads must not stop a jail."""
    with suppress(OSError):  # its disk is full, say
        if select.select([], [2], [], 0)[1]:
            os.write(2, text.encode(errors="replace"))
