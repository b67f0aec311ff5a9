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
import errno
import os
import shutil
import signal
import socket
import traceback
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from edge_agent.jail import protocol
from edge_agent.jail.api import MAX_MESSAGE, Exit, Jail, JailGone, JailSpec, Usage
from edge_agent.jail.client import make_request
from edge_agent.state.files import Files
from edge_agent.state.local_files import LocalFiles
from shared.errors import Reason, RoostError
from shared.resources import Resources

Program = Callable[["FakeAgent"], Awaitable[None]]
WARM = b'{"kind": "warm"}'
TaskProgram = Callable[["FakeTask"], Awaitable[int]]  # its exit code


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
        self.guarded: dict[int, tuple[Callable[[], None], asyncio.Event]] = {}  # by inode
        self.ports: dict[int, socket.socket] = {}  # who listens inside: sockets at free ports of the host
        self.warm_ups = 0

    async def read(self, name: str) -> bytes:
        """A file of its state, once it may be opened."""
        if guard := self.guarded.get((self.state / name).stat().st_ino):
            opening, released = guard
            opening()
            await released.wait()
        return (self.state / name).read_bytes()

    def listen(self, port: int) -> socket.socket:
        """At 127.0.0.1:port inside. OSError if it is taken."""
        if self._listens(port):
            raise OSError(errno.EADDRINUSE, f"port {port} is taken")
        self.ports[port] = sock = socket.create_server(("127.0.0.1", 0))
        sock.setblocking(False)
        return sock

    def connect(self, port: int) -> socket.socket:
        """To 127.0.0.1:port inside."""
        if not self._listens(port):
            raise ConnectionRefusedError(errno.ECONNREFUSED, f"nobody listens at port {port} inside")
        sock = socket.create_connection(self.ports[port].getsockname())
        sock.setblocking(False)
        return sock

    def _listens(self, port: int) -> bool:
        return port in self.ports and self.ports[port].fileno() >= 0

    async def receive(self) -> bytes:
        """What comes next. When it is to warm up, it is ready at once."""
        while (message := await self._next()) == WARM:
            self.warm_ups += 1
            await self.send(b'{"kind": "ready"}')
        return message

    async def _next(self) -> bytes:
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
        self.limits = spec.limits
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

    @property
    def warm(self) -> bool:
        return self._agent.warm_ups > 0

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

    async def listen(self, port: int) -> socket.socket:
        self._check_port(port)
        try:
            return self._agent.listen(port)
        except OSError as error:
            raise RoostError(Reason.JAIL_FAILED, str(error)) from error

    async def connect(self, port: int) -> socket.socket:
        self._check_port(port)
        return self._agent.connect(port)

    async def freeze(self) -> None:
        self._check()
        self._agent.thawed.clear()

    async def thaw(self) -> None:
        self._check()
        self._agent.thawed.set()

    async def usage(self) -> Usage:
        self._check()
        return Usage(memory_bytes=1 << 20, cpu_seconds=0.001, pids=1 + (self._task is not None))

    async def resize(self, limits: Resources) -> None:
        self._check()
        if limits.memory_bytes < (await self.usage()).memory_bytes:
            raise RoostError(Reason.JAIL_FAILED, "it uses more memory than that", "choose more")
        self.limits = limits

    async def guard(self, fd: int, opening: Callable[[], None]) -> None:
        self._check()
        self._agent.guarded[os.fstat(fd).st_ino] = opening, asyncio.Event()

    async def release(self, fd: int) -> None:
        self._check()
        if guard := self._agent.guarded.pop(os.fstat(fd).st_ino, None):
            guard[1].set()

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
            for sock in self._agent.ports.values():
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)  # whoever waits in accept is woken
                sock.close()
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

    def _check_port(self, port: int) -> None:
        self._check()
        if not 1 <= port <= 65_535:
            raise RoostError(Reason.JAIL_FAILED, f"{port} is no port")

    def _check(self) -> None:
        if self._exit.done():
            raise JailGone(self._exit.result())


class FakeTask:
    """A jail of a program that is no agent, which sees `spec`, `state` and what `say` writes."""

    def __init__(self, jails: FakeJails, spec: JailSpec, state: Path) -> None:
        self.spec = spec
        self.state = state
        self.out_of_memory = False
        self._jails = jails
        self._files = LocalFiles(state)
        self._pipes = (os.pipe(), os.pipe())
        self._program: asyncio.Task[int] | None = None
        self._exit: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()

    def say(self, output: bytes, errors: bytes = b"") -> None:
        """Less than a pipe holds."""
        for (_, writable), data in zip(self._pipes, (output, errors), strict=True):
            os.write(writable, data)

    @property
    def jail_id(self) -> str:
        return self.spec.jail_id

    @property
    def files(self) -> Files:
        self._check()
        return self._files

    async def begin(self) -> tuple[int, int]:
        self._check()
        self._program = asyncio.create_task(self._run(), name=f"fake task {self.jail_id}")
        return self._pipes[0][0], self._pipes[1][0]

    async def _run(self) -> int:
        try:
            return await self._jails.task_program(self)
        finally:
            for _, writable in self._pipes:
                os.close(writable)

    async def wait(self, timeout: float) -> int | None:
        self._check()
        assert self._program is not None
        await asyncio.wait({self._program, self._exit}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        self._check()
        return self._program.result() if self._program.done() else None

    async def kill(self) -> Exit:
        program = self._program
        if not self._exit.done():
            code = program.result() if program is not None and program.done() else -signal.SIGKILL
            self.end(Exit(code, self.out_of_memory))
        if program is not None:
            await asyncio.wait({program})
        return self._exit.result()

    def end(self, exit: Exit) -> None:
        self._exit.set_result(exit)
        self._files.close()
        shutil.rmtree(self.state)
        del self._jails.tasks[self.jail_id]
        if self._program is not None:
            self._program.cancel()
        else:
            for pipe in self._pipes:
                for fd in pipe:
                    os.close(fd)

    def _check(self) -> None:
        if self._exit.done():
            raise JailGone(self._exit.result())


async def _no_tasks(task: FakeTask) -> int:
    raise AssertionError(f"nobody said what task {task.jail_id} does")


@dataclass
class FakeZygote:
    spec: JailSpec
    ended: bool = False

    @property
    def jail_id(self) -> str:
        return self.spec.jail_id

    async def kill(self) -> None:
        self.ended = True


class FakeJails:
    """`program` is what every agent runs, whatever its argv. `running` are the jails that live, by id.
    `refusals`: errors that the next calls of `make` or `task` raise, one each. `tasks`: those that live."""

    def __init__(self, directory: Path, program: Program, task_program: TaskProgram = _no_tasks) -> None:
        self.directory = directory
        self.program = program
        self.task_program = task_program
        self.running: dict[str, FakeJail] = {}
        self.tasks: dict[str, FakeTask] = {}
        self.refusals: list[RoostError] = []
        self.zygotes: list[FakeZygote] = []
        self.zygote_refusals: list[RoostError] = []
        self.made: list[JailSpec] = []

    async def zygote(self, spec: JailSpec) -> FakeZygote:
        if self.zygote_refusals:
            raise self.zygote_refusals.pop(0)
        make_request(spec)
        self.zygotes.append(FakeZygote(spec))
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

    async def task(self, spec: JailSpec) -> FakeTask:
        if self.refusals:
            raise self.refusals.pop(0)
        make_request(spec, protocol.Way.TASK)
        self.made.append(spec)
        if spec.jail_id in self.tasks:
            raise RoostError(Reason.JAIL_FAILED, f"jail {spec.jail_id} runs already")
        state = self.directory.with_name(f"{self.directory.name}-tasks") / spec.jail_id
        state.mkdir(parents=True)
        task = self.tasks[spec.jail_id] = FakeTask(self, spec, state)
        return task

    async def adopt(self) -> list[Jail]:
        return list(self.running.values())

    async def directories(self) -> list[str]:
        return sorted(path.name for path in self.directory.iterdir()) if self.directory.exists() else []

    async def discard(self, jail_id: str) -> None:
        if jail_id in self.running:
            raise RoostError(Reason.JAIL_FAILED, f"jail {jail_id} runs, so its directory stays")
        shutil.rmtree(self.directory / jail_id, ignore_errors=True)

    async def close(self) -> None:
        for jail in [*self.running.values(), *self.tasks.values()]:
            await jail.kill()
