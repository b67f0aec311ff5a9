"""A child process owned by a scope: it ends with the test, or with this process at the latest."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType

import psutil

from tests.support.etcd import DYING_WITH_PARENT

ROOT = Path(__file__).parents[2]


class Child:
    """A command with its output in a log file. After it has ended, `start` runs it again. `environment` is
    added to this process's own."""

    def __init__(
        self, argv: Sequence[str], log: Path, environment: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        self._argv = argv
        self._log = log
        self._environment = environment
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *DYING_WITH_PARENT,
                *self._argv,
                cwd=ROOT,
                env={**os.environ, **self._environment},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                process_group=0,  # Ctrl-C is for the test, which ends it
            )

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    def log(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def tree(self) -> list[psutil.Process]:
        """It and all its descendants, children last."""
        with suppress(psutil.NoSuchProcess):
            me = psutil.Process(self.pid)
            return [me, *me.children(recursive=True)]
        return []

    def suspend(self) -> None:
        """As if the machine stood still: SIGSTOP to all of its processes."""
        for process in self.tree():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        for process in reversed(self.tree()):
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)

    async def kill(self) -> None:
        if self.running:
            os.kill(self.pid, signal.SIGKILL)
            await self.wait(5.0)

    async def stop(self, timeout: float = 30.0) -> int:
        """SIGTERM, and its exit code. One that does not end in time is killed, and the test fails."""
        if self.running:
            self.resume()
            os.kill(self.pid, signal.SIGTERM)
            try:
                await self.wait(timeout)
            except TimeoutError:
                await self.kill()
                raise AssertionError(f"it did not stop in {timeout} s:\n{self.log()[-3000:]}") from None
        assert self._process is not None
        return self._process.returncode or 0

    async def wait(self, timeout: float) -> None:
        assert self._process is not None
        async with asyncio.timeout(timeout):
            await self._process.wait()


class Process(Child):
    """`python -m ...`."""

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        log: Path,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        super().__init__([sys.executable, "-m", module, *arguments], log, environment)
