"""The daemon's side of the jailer: `Jails` and `Jail` over the inherited socket."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn, TypeVar

from edge_agent.jail import protocol
from edge_agent.jail.api import Exit, Jail, JailGone, JailSpec, TaskJail, Usage, Zygote
from edge_agent.jail.calls import Answer, CallFailed, Calls, CallsEnded
from edge_agent.jail.protocol import Way
from edge_agent.jail.remote_files import RemoteFiles
from edge_agent.jail.remote_network import RemoteNetwork
from edge_agent.jail.turns import TurnsEnded, TurnSocket
from edge_agent.jail.wire import Body
from shared.errors import Reason, RoostError
from shared.resources import Resources

log = logging.getLogger(__name__)

_SECONDS = 10.0  # of most requests; the jailer itself gives a freeze 5
_MAKE_SECONDS = 15.0  # the jailer gives it 10
_IMPORT_SECONDS = 65.0  # of a zygote; the jailer gives it 60
_DISCARD_SECONDS = 120.0  # a large tree on a slow disk
_EXIT_SECONDS = 5.0  # from the end of an agent's socket to the news of its end
_PAGE = 1000


T = TypeVar("T")


def make_request(spec: JailSpec, way: Way | None = None) -> protocol.Make:
    """RoostError JAIL_FAILED for a name or a limit that no jail may have."""
    limits, disk = spec.limits, spec.disk
    way = way or (Way.FORK if spec.zygote else Way.EXEC)
    try:
        return protocol.Make(
            spec.jail_id,
            spec.bundle,
            spec.argv,
            tuple(f"{name}={value}" for name, value in spec.env.items()),
            protocol.Limits(
                limits.memory_bytes,
                limits.cpu_millis,
                limits.pids,
                disk.state_bytes,
                disk.read_bps,
                disk.write_bps,
            ),
            way,
            spec.zygote,
            tuple(name for name, _ in limits.devices),
            spec.packages,
        )
    except ValueError as error:
        raise RoostError(Reason.JAIL_FAILED, f"jail {spec.jail_id}: {error}") from error


class JailedAgent:
    """See `Jail`. Made by `JailerClient` alone."""

    def __init__(
        self,
        jails: JailerClient,
        jail_id: str,
        forked: bool,
        limits: Resources,
        control: int,
        turns: int,
    ) -> None:
        self.limits = limits
        self._jails = jails
        self._jail_id = jail_id
        self._forked = forked
        self._control = Calls(socket.socket(fileno=control))
        self._turns = TurnSocket(socket.socket(fileno=turns))
        self._exit: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()
        self._guarded: dict[int, Callable[[], None]] = {}  # by inode

    def __repr__(self) -> str:
        ended = self._exit.result() if self._exit.done() else "running"
        return f"<jail {self._jail_id}: {ended}>"

    @property
    def jail_id(self) -> str:
        return self._jail_id

    @property
    def files(self) -> RemoteFiles:
        return RemoteFiles(self._ask_init)

    @property
    def ended(self) -> bool:
        return self._exit.done()

    @property
    def torn(self) -> bool:
        """Did an earlier daemon end in the midst of a message? Then nothing can be said to the agent."""
        return self._turns.torn

    async def start(self) -> None:
        if self._forked:
            await self._ask_jailer(protocol.Fork(self._jail_id))
            return
        try:
            await self._ask_init({"do": "start"}, _SECONDS)
        except CallFailed as failed:
            raise RoostError(Reason.JAIL_FAILED, failed.message, failed.hint) from None

    async def send(self, message: bytes) -> None:
        if self._exit.done():
            raise JailGone(self._exit.result())
        await self._or_gone(self._turns.send(message))

    async def receive(self) -> bytes:
        return await self._or_gone(self._turns.receive())

    async def listen(self, port: int) -> socket.socket:
        return await RemoteNetwork(self._ask_init).listen(port)

    async def connect(self, port: int) -> socket.socket:
        return await RemoteNetwork(self._ask_init).connect(port)

    async def freeze(self) -> None:
        await self._ask_jailer(protocol.Freeze(self._jail_id))

    async def thaw(self) -> None:
        await self._ask_jailer(protocol.Thaw(self._jail_id))

    async def usage(self) -> Usage:
        answer = await self._ask_jailer(protocol.Measure(self._jail_id))
        return Usage(**answer.values)

    async def resize(self, limits: Resources) -> None:
        sizes = (limits.memory_bytes, limits.cpu_millis, limits.pids)
        try:
            request = protocol.Resize(self._jail_id, *sizes)
        except ValueError as error:
            raise RoostError(Reason.JAIL_FAILED, f"jail {self._jail_id}: {error}") from error
        await self._ask_jailer(request)
        self.limits = limits

    async def guard(self, fd: int, opening: Callable[[], None]) -> None:
        inode = os.fstat(fd).st_ino
        self._guarded[inode] = opening
        try:
            await self._ask_jailer(protocol.Guard(self._jail_id), (fd,))
        except BaseException:
            del self._guarded[inode]
            raise

    async def release(self, fd: int) -> None:
        self._guarded.pop(os.fstat(fd).st_ino, None)
        await self._ask_jailer(protocol.Release(self._jail_id), (fd,))

    def told_opening(self, inode: int) -> None:
        """The jailer says so. It may have been released meanwhile."""
        if opening := self._guarded.get(inode):
            opening()

    async def kill(self) -> Exit:
        with suppress(JailGone):
            answer = await self._ask_jailer(protocol.Kill(self._jail_id))
            self.set_ended(Exit(**answer.values))
        # What came last is not waited for: whoever kills wants no more of it.
        self._turns.close()
        return self._exit.result()

    def set_ended(self, exit: Exit) -> None:
        """The jailer says so. What the agent has sent before can still be received."""
        if not self._exit.done():
            self._exit.set_result(exit)
            self._control.close()
            self._turns.end()
            self._jails.forget(self)

    async def _or_gone(self, work: Awaitable[T]) -> T:
        try:
            return await work
        except TurnsEnded:
            await self._raise_gone(f"the agent of jail {self._jail_id} closed its socket, but goes on")

    async def _ask_init(self, body: Body, timeout: float) -> Answer:
        try:
            return await self._control.ask(body, timeout)
        except CallsEnded:
            await self._raise_gone(f"the init of jail {self._jail_id} closed its socket")
        except TimeoutError:
            raise RoostError(
                Reason.JAIL_FAILED,
                f"jail {self._jail_id} did not do {body['do']} in {timeout:g} s",
                "the machine may be overloaded, or the jail's processor share too small",
            ) from None

    async def _ask_jailer(
        self, request: protocol.OfJail | protocol.OfFile, fds: tuple[int, ...] = ()
    ) -> Answer:
        if self._exit.done():
            raise JailGone(self._exit.result())
        try:
            return await self._jails.ask(request, _SECONDS, fds)
        except RoostError:
            if self._exit.done():  # the refusal came because it has ended meanwhile
                raise JailGone(self._exit.result()) from None
            raise

    async def _raise_gone(self, otherwise: str) -> NoReturn:
        """Waits for the news of the end, which follows the end of the sockets."""
        try:
            async with asyncio.timeout(_EXIT_SECONDS):
                exit = await asyncio.shield(self._exit)
        except TimeoutError:
            raise RoostError(Reason.AGENT_CRASHED, otherwise) from None
        raise JailGone(exit) from None


class JailedTask(JailedAgent):
    """See `TaskJail`."""

    async def begin(self) -> tuple[int, int]:
        try:
            answer = await self._ask_init({"do": "start"}, _SECONDS)
        except CallFailed as failed:
            raise RoostError(Reason.JAIL_FAILED, failed.message, failed.hint) from None
        output, errors = answer.fds
        return output, errors

    async def wait(self, timeout: float) -> int | None:
        try:
            answer = await self._control.ask({"do": "wait"}, timeout)
        except TimeoutError:
            return None
        except CallsEnded:
            await self._raise_gone(f"the init of jail {self._jail_id} closed its socket")
        return int(answer.values["code"])


class JailedZygote:
    """See `Zygote`."""

    def __init__(self, jails: JailerClient, jail_id: str) -> None:
        self._jails = jails
        self.jail_id = jail_id
        self.ended = False

    async def kill(self) -> None:
        if not self.ended:
            self.ended = True
            with suppress(RoostError):  # it has just ended by itself
                await self._jails.ask(protocol.Kill(self.jail_id), _SECONDS)


class JailerClient:
    """See `Jails`. Owns the jailer's socket; `closed` returns when the jailer is gone."""

    def __init__(self, sock: socket.socket) -> None:
        self._running: dict[str, JailedAgent] = {}
        self._zygotes: dict[str, JailedZygote] = {}
        self._awaited: dict[str, Exit | None] = {}  # asked for, and perhaps ended before the answer is read
        self._closed = asyncio.Event()
        self._calls = Calls(sock, self._on_event, self._closed.set)

    async def __aenter__(self) -> JailerClient:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.close()

    async def closed(self) -> None:
        await self._closed.wait()

    def close(self) -> None:
        """The jails run on."""
        self._calls.close()

    async def make(self, spec: JailSpec) -> JailedAgent:
        return await self._obtain(make_request(spec), _MAKE_SECONDS)

    async def task(self, spec: JailSpec) -> TaskJail:
        task = await self._obtain(make_request(spec, Way.TASK), _MAKE_SECONDS)
        assert isinstance(task, JailedTask)
        return task

    async def zygote(self, spec: JailSpec) -> Zygote:
        zygote = self._zygotes[spec.jail_id] = JailedZygote(self, spec.jail_id)
        try:
            with _as_roost_errors("zygote", _IMPORT_SECONDS):
                await self._calls.ask(protocol.encode(make_request(spec, Way.ZYGOTE)), _IMPORT_SECONDS)
        except BaseException:
            del self._zygotes[spec.jail_id]
            with suppress(CallsEnded):
                self._calls.post(protocol.encode(protocol.Kill(spec.jail_id)))
            raise
        return zygote

    async def adopt(self) -> list[Jail]:
        answer = await self.ask(protocol.List(), _SECONDS)
        adopted: list[Jail] = []
        for jail_id in answer.values["jail_ids"]:
            if jail_id in self._running:
                continue
            try:
                jail = await self._obtain(protocol.Attach(jail_id), _SECONDS)
            except RoostError as error:  # it has just ended
                log.info("jail %s was not adopted: %s", jail_id, error)
                continue
            if jail.torn:
                log.warning("jail %s is killed: the last daemon ended in the midst of a message", jail_id)
                await jail.kill()
            else:
                adopted.append(jail)
        return adopted

    async def directories(self) -> list[str]:
        found: list[str] = []
        while True:
            answer = await self.ask(protocol.Directories(found[-1] if found else ""), _SECONDS)
            page = answer.values["jail_ids"]
            found += page
            if len(page) < _PAGE:
                return found

    async def discard(self, jail_id: str) -> None:
        await self.ask(protocol.Discard(jail_id), _DISCARD_SECONDS)

    async def ask(self, request: protocol.Request, timeout: float, fds: tuple[int, ...] = ()) -> Answer:
        """RoostError JAIL_FAILED for a refusal, no answer in time, or no jailer."""
        with _as_roost_errors(request.do, timeout):
            return await self._calls.ask(protocol.encode(request), timeout, fds)

    def forget(self, jail: JailedAgent) -> None:
        if self._running.get(jail.jail_id) is jail:
            del self._running[jail.jail_id]

    async def _obtain(self, request: protocol.Make | protocol.Attach, timeout: float) -> JailedAgent:
        jail_id = request.jail_id
        self._awaited[jail_id] = None
        try:
            with _as_roost_errors(request.do, timeout):
                try:
                    answer = await self._calls.ask(protocol.encode(request), timeout)
                except (asyncio.CancelledError, TimeoutError):
                    if isinstance(request, protocol.Make):  # it may be made all the same
                        with suppress(CallsEnded):
                            self._calls.post(protocol.encode(protocol.Kill(jail_id)))
                    raise
        finally:
            exit = self._awaited.pop(jail_id)
        way = request.way if isinstance(request, protocol.Make) else Way.EXEC
        kind = JailedTask if way is Way.TASK else JailedAgent
        devices = tuple((name, 1) for name in answer.values.pop("devices"))
        limits = Resources(**answer.values, devices=devices)
        jail = self._running[jail_id] = kind(self, jail_id, way is Way.FORK, limits, *answer.fds)
        if exit is not None:
            jail.set_ended(exit)
        return jail

    def _on_event(self, body: Body) -> None:
        match body.get("event"):
            case "exited":
                exit = Exit(body["code"], body["out_of_memory"], body["stderr_tail"], body["disk_full"])
                self._ended(body["jail_id"], exit)
            case "opening" if jail := self._running.get(body["jail_id"]):
                jail.told_opening(body["inode"])

    def _ended(self, jail_id: str, exit: Exit) -> None:
        if jail_id in self._running:
            self._running[jail_id].set_ended(exit)
        elif zygote := self._zygotes.pop(jail_id, None):
            zygote.ended = True
        elif jail_id in self._awaited:
            self._awaited[jail_id] = exit


@contextmanager
def _as_roost_errors(do: str, timeout: float) -> Iterator[None]:
    try:
        yield
    except CallFailed as failed:
        raise RoostError(Reason.JAIL_FAILED, failed.message, failed.hint) from None
    except CallsEnded:
        raise RoostError(Reason.JAIL_FAILED, "the jailer is gone, and this daemon must end") from None
    except TimeoutError:
        raise RoostError(
            Reason.JAIL_FAILED, f"the jailer did not do {do} in {timeout:g} s", "is the machine overloaded?"
        ) from None
