"""Starts processes stage by stage, tells of those that end by themselves, and stops all in reverse order.

Invariant: when `stop` has returned, every process that `start` made, and every process of its group, is gone.
Each waits for a deadline at most. Should this process itself be killed, its children get SIGTERM.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from roost.up import tied
from roost.up.layout import Process
from roost.up.processes import started_at, tail
from roost.up.record import ProcessRecord
from shared.errors import Reason, RoostError

_PROBE_PERIOD = 0.1
_KILL_TIMEOUT = 5.0
_CLEAN_TIMEOUT = 20.0  # seconds, after which a cleaner is killed
_TAIL_LINES = 15

Probe = Callable[[Process], Awaitable[bool]]
Report = Callable[[str], None]


@dataclass(slots=True)
class _Child:
    spec: Process
    process: asyncio.subprocess.Process
    started: int
    watch: asyncio.Task[None]  # ends when it, its group and what it left are gone


class Supervisor:
    """`probe` says whether a process serves; `report` tells a person, in a line, what ended."""

    def __init__(
        self,
        processes: Sequence[Process],
        probe: Probe,
        report: Report,
        start_timeout: float = 30.0,
        stop_timeout: float = 15.0,
    ) -> None:
        self._specs = processes
        self._probe = probe
        self._report = report
        self._start_timeout = start_timeout
        self._stop_timeout = stop_timeout
        self._children: list[_Child] = []
        self._serving = False  # all of them, so that one that ends is worth a report

    async def start(self) -> None:
        """Returns when all serve. RoostError with the end of the log of one that does not in time."""
        ordered = sorted(self._specs, key=lambda spec: spec.stage)
        for _, stage in itertools.groupby(ordered, key=lambda spec: spec.stage):
            begun = [await self._spawn(spec) for spec in stage]
            await asyncio.gather(*(self._wait_serving(child) for child in begun))
        self._serving = True

    async def stop(self) -> None:
        self._serving = False
        by_stage = sorted(self._children, key=lambda child: -child.spec.stage)
        for _, stage in itertools.groupby(by_stage, key=lambda child: child.spec.stage):
            await asyncio.gather(*(self._end(child) for child in stage))

    def records(self) -> tuple[ProcessRecord, ...]:
        return tuple(
            ProcessRecord(
                child.spec.name,
                child.process.pid,
                child.started,
                child.spec.address,
                str(child.spec.log),
            )
            for child in self._children
        )

    async def _spawn(self, spec: Process) -> _Child:
        for directory in spec.directories:
            directory.mkdir(parents=True, exist_ok=True)
        for path, text in spec.files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        spec.log.parent.mkdir(parents=True, exist_ok=True)
        if spec.log.exists():  # that of the run before is kept
            os.replace(spec.log, spec.log.with_suffix(".log.old"))
        with spec.log.open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                *_tied(spec.argv),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **spec.env},
                process_group=0,  # a Ctrl-C at the terminal is for `roost up`, which stops them in order
            )
        watch = asyncio.create_task(self._watch(spec, process), name=f"watch {spec.name}")
        child = _Child(spec, process, started_at(process.pid) or 0, watch)
        self._children.append(child)
        return child

    async def _wait_serving(self, child: _Child) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._start_timeout
        while not await self._probe(child.spec):
            if child.process.returncode is not None:
                raise _failed(child.spec, f"{child.spec.name} {_ended(child.process.returncode)}")
            if loop.time() >= deadline:
                raise _failed(child.spec, f"{child.spec.name} does not serve after {self._start_timeout:g} s")
            await asyncio.sleep(_PROBE_PERIOD)

    async def _watch(self, spec: Process, process: asyncio.subprocess.Process) -> None:
        code = await process.wait()
        _kill_group(process.pid)  # at once: later, the number might be another group's
        if self._serving:
            self._report(f"{spec.name} {_ended(code)}; the others go on. Its log: {spec.log}")
        if code != 0 and spec.clean:
            await self._clean(spec)

    async def _clean(self, spec: Process) -> None:
        with spec.log.open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *_tied(spec.clean), stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0
            )
        try:
            async with asyncio.timeout(_CLEAN_TIMEOUT):
                await process.wait()
        except TimeoutError:
            _kill_group(process.pid)
            await process.wait()

    async def _end(self, child: _Child) -> None:
        if child.process.returncode is None:
            child.process.terminate()
        try:
            async with asyncio.timeout(self._stop_timeout):
                await child.process.wait()
        except TimeoutError:
            _kill_group(child.process.pid)
        await asyncio.wait((child.watch,), timeout=_KILL_TIMEOUT + _CLEAN_TIMEOUT)
        if not child.watch.done():  # the kernel does not let it end
            self._report(f"{child.spec.name}, process {child.process.pid}, can't be stopped")


def _tied(argv: Sequence[str]) -> tuple[str, ...]:
    return (sys.executable, "-S", "-E", tied.__file__, str(os.getpid()), *argv)


def _kill_group(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def _ended(code: int) -> str:
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def _failed(spec: Process, message: str) -> RoostError:
    lines = tail(spec.log, _TAIL_LINES)
    return RoostError(
        Reason.INTERNAL, message, "\n  ".join([f"its log, {spec.log}, ends with:", *(lines or ["(nothing)"])])
    )
