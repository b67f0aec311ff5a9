"""The daemon's side of the jailer: `Jails` and `Jail` over the inherited socket."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from edge_agent.jail import protocol
from edge_agent.jail.api import Exit, Jail, JailSpec, TaskJail, Zygote
from edge_agent.jail.calls import Answer, CallFailed, Calls, CallsEnded
from edge_agent.jail.cgroups.freezing import Freezing
from edge_agent.jail.jailed import JailedAgent, JailedTask, jailer_gone
from edge_agent.jail.protocol import Way
from edge_agent.jail.wire import Body, close_all
from shared.errors import Reason, RoostError
from shared.resources import Resources

log = logging.getLogger(__name__)

_SECONDS = 10.0  # of most requests
_MAKE_SECONDS = 15.0  # the jailer gives it 10
_IMPORT_SECONDS = 65.0  # of a zygote; the jailer gives it 60
_DISCARD_SECONDS = 120.0  # a large tree on a slow disk
_PAGE = 1000


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
        self._calls = Calls(sock, self._on_event, self._on_end)

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
            self._give_up(spec.jail_id)
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
            except RoostError as error:  # it has just ended; or it goes on, of no more use to anybody
                log.info("jail %s was not adopted: %s", jail_id, error)
                self._give_up(jail_id)
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
                        self._give_up(jail_id)
                    raise
        finally:
            exit = self._awaited.pop(jail_id)
        way = request.way if isinstance(request, protocol.Make) else Way.EXEC
        kind = JailedTask if way is Way.TASK else JailedAgent
        control, turns, freezing = self._taken(jail_id, answer.fds)
        devices = tuple((name, 1) for name in answer.values.pop("devices"))
        limits = Resources(**answer.values, devices=devices)
        jail = kind(self, jail_id, way is Way.FORK, limits, control, turns, freezing)
        self._running[jail_id] = jail
        if exit is not None:
            jail.set_ended(exit)
        elif self._closed.is_set():
            jail.lose_jailer()
        return jail

    def _taken(self, jail_id: str, fds: tuple[int, ...]) -> tuple[int, int, Freezing]:
        try:
            control, turns, *freezer = fds
            return control, turns, Freezing(tuple(freezer))
        except ValueError:
            close_all(fds)
            self._give_up(jail_id)
            raise RoostError(
                Reason.JAIL_FAILED,
                f"the jailer is not of this daemon's version: {len(fds)} descriptors came with {jail_id}",
                "restart the node's service, which starts both anew",
            ) from None

    def _give_up(self, jail_id: str) -> None:
        """Ends what nobody waits for any more. It may have ended, or never be made."""
        with suppress(CallsEnded):
            self._calls.post(protocol.encode(protocol.Kill(jail_id)))

    def _on_end(self) -> None:
        self._closed.set()
        for jail in self._running.values():
            jail.lose_jailer()

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
        raise jailer_gone() from None
    except TimeoutError:
        raise RoostError(
            Reason.JAIL_FAILED, f"the jailer did not do {do} in {timeout:g} s", "is the machine overloaded?"
        ) from None
