"""A jail as the daemon holds it: through its sockets and its freezer, and by what it asks the jailer."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import NoReturn, Protocol, TypeVar

from edge_agent.jail import protocol
from edge_agent.jail.api import Exit, JailGone, Usage
from edge_agent.jail.calls import Answer, CallFailed, Calls, CallsEnded
from edge_agent.jail.cgroups.freezing import Freezing
from edge_agent.jail.remote_files import RemoteFiles
from edge_agent.jail.remote_network import RemoteNetwork
from edge_agent.jail.turns import TurnsEnded, TurnSocket
from edge_agent.jail.wire import Body
from shared.errors import Reason, RoostError
from shared.resources import Resources

_SECONDS = 10.0  # of a request
_EXIT_SECONDS = 5.0  # from the end of an agent's socket, or of its control group, to the news of its end
_FREEZE_SECONDS, _POLL = 5.0, 0.002


T = TypeVar("T")


class Jailer(Protocol):
    """What a jail asks of whoever made it."""

    async def ask(self, request: protocol.Request, timeout: float, fds: tuple[int, ...] = ()) -> Answer:
        """RoostError JAIL_FAILED for a refusal, no answer in time, or no jailer."""
        ...

    def forget(self, jail: JailedAgent) -> None: ...


def jailer_gone() -> RoostError:
    return RoostError(Reason.JAIL_FAILED, "the jailer is gone, and this daemon must end")


class JailedAgent:
    """See `Jail`. Made by `JailerClient` alone. Owns its two sockets and `freezing`."""

    def __init__(
        self,
        jails: Jailer,
        jail_id: str,
        forked: bool,
        limits: Resources,
        control: int,
        turns: int,
        freezing: Freezing,
    ) -> None:
        self.limits = limits
        self._jails = jails
        self._jail_id = jail_id
        self._forked = forked
        self._control = Calls(socket.socket(fileno=control))
        self._turns = TurnSocket(socket.socket(fileno=turns))
        self._freezing = freezing
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
        return RemoteFiles(self._ask_inside)

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
            await self._ask_inside({"do": "start"}, _SECONDS)
        except CallFailed as failed:
            raise RoostError(Reason.JAIL_FAILED, failed.message, failed.hint) from None

    async def send(self, message: bytes) -> None:
        if self._exit.done():
            raise JailGone(self._exit.result())
        await self._or_gone(self._turns.send(message))

    async def receive(self) -> bytes:
        return await self._or_gone(self._turns.receive())

    async def listen(self, port: int) -> socket.socket:
        return await RemoteNetwork(self._jail_id, self._ask_jailer).listen(port)

    async def connect(self, port: int) -> socket.socket:
        return await RemoteNetwork(self._jail_id, self._ask_jailer).connect(port)

    async def freeze(self) -> None:
        async with self._steering():
            try:
                await self._stop()
            except BaseException:
                if not self._freezing.closed:
                    with suppress(OSError):  # it has just ended
                        self._freezing.thaw()
                raise

    async def thaw(self) -> None:
        async with self._steering():
            self._freezing.thaw()

    async def _stop(self) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _FREEZE_SECONDS
        stopped = self._freezing.freeze()
        while not stopped:
            if loop.time() > deadline:
                raise RoostError(
                    Reason.JAIL_FAILED,
                    f"the processes of jail {self._jail_id} did not stop in {_FREEZE_SECONDS:g} s",
                    "they may wait for a disk; it was thawed again",
                )
            await asyncio.sleep(_POLL)
            self._check_freezer()
            stopped = self._freezing.frozen()
        if self._guarded:
            # When a jailer dies the kernel lets those through who wait for a guarded file, to what is not its
            # content. One that answers now was alive until all had stopped.
            await self._ask_jailer(protocol.Measure(self._jail_id))

    @asynccontextmanager
    async def _steering(self) -> AsyncIterator[None]:
        self._check_freezer()
        try:
            yield
        except OSError as error:
            await self._raise_gone(
                f"jail {self._jail_id} can't be frozen or thawed: {error}", Reason.JAIL_FAILED
            )

    def _check_freezer(self) -> None:
        if self._exit.done():
            raise JailGone(self._exit.result())
        if self._freezing.closed:
            raise jailer_gone()

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
            self._freezing.close()
            self._jails.forget(self)

    def lose_jailer(self) -> None:
        """Its socket has ended. What is frozen stays so, for the next daemon if there is one."""
        self._freezing.close()

    async def _or_gone(self, work: Awaitable[T]) -> T:
        try:
            return await work
        except TurnsEnded:
            await self._raise_gone(f"the agent of jail {self._jail_id} closed its socket, but goes on")

    async def _ask_inside(self, body: Body, timeout: float) -> Answer:
        try:
            return await self._control.ask(body, timeout)
        except CallsEnded:
            await self._raise_gone(f"who serves the files of jail {self._jail_id} closed its socket")
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

    async def _raise_gone(self, otherwise: str, reason: Reason = Reason.AGENT_CRASHED) -> NoReturn:
        """Waits for the news of the end, which follows the end of the sockets and of the control group."""
        try:
            async with asyncio.timeout(_EXIT_SECONDS):
                exit = await asyncio.shield(self._exit)
        except TimeoutError:
            raise RoostError(reason, otherwise) from None
        raise JailGone(exit) from None


class JailedTask(JailedAgent):
    """See `TaskJail`."""

    async def begin(self) -> tuple[int, int]:
        try:
            answer = await self._ask_inside({"do": "start"}, _SECONDS)
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
            await self._raise_gone(f"who serves the files of jail {self._jail_id} closed its socket")
        return int(answer.values["code"])
