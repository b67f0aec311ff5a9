"""Jails without walls: directories for state, and agents that are coroutines of this process.

    jails = FakeJails(tmp_path, echo)
    async def echo(agent: FakeAgent) -> None:
        while True:
            await agent.send(await agent.receive())

What an agent does by itself: return (exit code 0), raise (exit code 1, the traceback on its standard error),
or call `await agent.hang()`. What a test does to a jail: `crash` and `run_out_of_memory`.
"""

from __future__ import annotations

import asyncio
import shutil
import signal
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from edge_agent.jail import protocol
from edge_agent.jail.api import MAX_MESSAGE, Exit, Jail, JailGone, JailSpec, Usage
from edge_agent.jail.client import make_request
from edge_agent.state.files import Files
from edge_agent.state.local_files import LocalFiles
from shared.errors import Reason, RoostError

Program = Callable[["FakeAgent"], Awaitable[None]]


class AgentExit(Exception):
    """Raised by an agent to end with an exit code, as sys.exit would."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class FakeAgent:
    """What an agent's coroutine sees: its spec, its state, and both directions of its turn socket."""

    def __init__(self, spec: JailSpec, state: Path) -> None:
        self.spec = spec
        self.state = state
        self.to_agent: asyncio.Queue[bytes] = asyncio.Queue()
        self.from_agent: asyncio.Queue[bytes] = asyncio.Queue()
        self.thawed = asyncio.Event()
        self.thawed.set()

    async def receive(self) -> bytes:
        message = await self.to_agent.get()
        await self.thawed.wait()
        return message

    async def send(self, message: bytes) -> None:
        await self.thawed.wait()
        self.from_agent.put_nowait(message)

    async def hang(self) -> NoReturn:
        await asyncio.Event().wait()
        raise AssertionError("unreachable")


class FakeJail:
    def __init__(self, jails: FakeJails, spec: JailSpec, state: Path, program: Program) -> None:
        self._jails = jails
        self._agent = FakeAgent(spec, state)
        self._program = program
        self._task: asyncio.Task[None] | None = None
        self._exit: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()
        self._files = LocalFiles(state)

    @property
    def jail_id(self) -> str:
        return self._agent.spec.jail_id

    @property
    def files(self) -> Files:
        self._check()
        return self._files

    @property
    def ended(self) -> bool:
        return self._exit.done()

    @property
    def frozen(self) -> bool:
        return not self._agent.thawed.is_set()

    async def start(self) -> None:
        self._check()
        if self._task is not None:
            raise RoostError(Reason.JAIL_FAILED, "the agent of this jail was started already")
        self._task = asyncio.create_task(self._run(), name=f"fake agent {self.jail_id}")

    async def send(self, message: bytes) -> None:
        self._check()
        if len(message) > MAX_MESSAGE:
            raise RoostError(Reason.MESSAGE_TOO_LARGE, f"a message of {len(message)} bytes is too large")
        self._agent.to_agent.put_nowait(message)

    async def receive(self) -> bytes:
        coming = asyncio.ensure_future(self._agent.from_agent.get())
        try:
            await asyncio.wait({coming, self._exit}, return_when=asyncio.FIRST_COMPLETED)
            if coming.done():  # what it sent before it ended comes first
                return coming.result()
        finally:
            coming.cancel()
        raise JailGone(self._exit.result())

    async def freeze(self) -> None:
        self._check()
        self._agent.thawed.clear()

    async def thaw(self) -> None:
        self._check()
        self._agent.thawed.set()

    async def usage(self) -> Usage:
        self._check()
        return Usage(memory_bytes=1 << 20, cpu_seconds=0.001, pids=1 + (self._task is not None))

    async def kill(self) -> Exit:
        self.end(Exit(-signal.SIGKILL, out_of_memory=False))
        if self._task is not None:
            await asyncio.wait({self._task})
        return self._exit.result()

    def crash(self, code: int = 1, stderr: str = "") -> None:
        self.end(Exit(code, out_of_memory=False, stderr_tail=stderr))

    def run_out_of_memory(self) -> None:
        self.end(Exit(-signal.SIGKILL, out_of_memory=True))

    def end(self, exit: Exit) -> None:
        if not self._exit.done():
            self._exit.set_result(exit)
            self._files.close()
            self._jails.running.pop(self.jail_id, None)
            if self._task is not None:
                self._task.cancel()

    async def _run(self) -> None:
        try:
            await self._program(self._agent)
            self.end(Exit(0, out_of_memory=False))
        except AgentExit as ended:
            self.end(Exit(ended.code, out_of_memory=False))
        except Exception:
            self.end(
                Exit(1, out_of_memory=False, stderr_tail=traceback.format_exc()[-protocol.STDERR_TAIL :])
            )

    def _check(self) -> None:
        if self._exit.done():
            raise JailGone(self._exit.result())


@dataclass
class FakeZygote:
    jail_id: str
    ended: bool = False

    async def kill(self) -> None:
        self.ended = True


class FakeJails:
    """`program` is what every agent runs, whatever its argv. `running` are the jails that live, by id.
    `refusals`: errors that the next calls of `make` raise, one each."""

    def __init__(self, directory: Path, program: Program) -> None:
        self.directory = directory
        self.program = program
        self.running: dict[str, FakeJail] = {}
        self.refusals: list[RoostError] = []
        self.zygotes: list[FakeZygote] = []
        self.zygote_refusals: list[RoostError] = []
        self.made: list[JailSpec] = []

    async def zygote(self, spec: JailSpec) -> FakeZygote:
        if self.zygote_refusals:
            raise self.zygote_refusals.pop(0)
        make_request(spec)
        self.zygotes.append(FakeZygote(spec.jail_id))
        return self.zygotes[-1]

    async def make(self, spec: JailSpec) -> FakeJail:
        if self.refusals:
            raise self.refusals.pop(0)
        make_request(spec)  # which checks it
        if spec.zygote and not any(z.jail_id == spec.zygote and not z.ended for z in self.zygotes):
            raise RoostError(Reason.JAIL_FAILED, f"there is no zygote {spec.zygote}")
        self.made.append(spec)
        if spec.jail_id in self.running:
            raise RoostError(Reason.JAIL_FAILED, f"jail {spec.jail_id} runs already")
        state = self.directory / spec.jail_id
        state.mkdir(parents=True, exist_ok=True)
        jail = self.running[spec.jail_id] = FakeJail(self, spec, state, self.program)
        return jail

    async def adopt(self) -> list[Jail]:
        return list(self.running.values())

    async def directories(self) -> list[str]:
        return sorted(path.name for path in self.directory.iterdir()) if self.directory.exists() else []

    async def discard(self, jail_id: str) -> None:
        if jail_id in self.running:
            raise RoostError(Reason.JAIL_FAILED, f"jail {jail_id} runs, so its directory stays")
        shutil.rmtree(self.directory / jail_id, ignore_errors=True)

    async def close(self) -> None:
        for jail in list(self.running.values()):
            await jail.kill()
