"""Keeps the jails: makes, watches and ends them. Nothing here waits; what takes time goes on in the
loop's callbacks, and the answer is given there.

What must hold: a request gets exactly one answer; a jail that ended leaves neither process, cgroup nor
descriptor; its end is told once. How it can fail: the kernel refuses an operation (answered with the
operation's name), or a jail does not end (see `graves`).
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any, assert_never

from edge_agent.jail import kernel, protocol, spawn, spawn_zygote
from edge_agent.jail.cell import Cell, Dying, Making, Running, Waiting
from edge_agent.jail.cgroups.base import Cgroups
from edge_agent.jail.config import JailerConfig
from edge_agent.jail.directories import Directories
from edge_agent.jail.forks import Forks
from edge_agent.jail.graves import Graves
from edge_agent.jail.ground import Ground, ground_steps
from edge_agent.jail.guards import Guards
from edge_agent.jail.loop import Loop
from edge_agent.jail.network import Networks
from edge_agent.jail.operations import carry_out
from edge_agent.jail.protocol import Refused, Way
from edge_agent.jail.served import ServedFiles
from edge_agent.jail.shares import Shares
from edge_agent.jail.shells import Shells
from edge_agent.jail.steps import MapIds, note
from edge_agent.jail.wire import Closed, Garbage
from edge_agent.jail.wright import Wright

log = logging.getLogger(__name__)

MAKE_SECONDS = 10.0
IMPORT_SECONDS = 60.0  # of a zygote
_SHELL_PAUSE = 0.005  # seconds after a fork, so that a shell's making holds up no agent's first turn

# How an answer is given: the request's id, the frame's body, descriptors that are given away.
Answer = Callable[[int, dict[str, Any], tuple[int, ...]], None]


class Keeper:
    """`answer` and `tell` reach whatever daemon there is now, or nobody."""

    def __init__(
        self,
        config: JailerConfig,
        wright: Wright,
        cgroups: Cgroups,
        directories: Directories,
        loop: Loop,
        answer: Answer,
        tell: Callable[[dict[str, Any]], None],
    ) -> None:
        self._config = config
        self._wright = wright
        self._cgroups = cgroups
        self._directories = directories
        self._loop = loop
        self._answer = answer
        self._tell = tell
        self._forks = Forks(loop, cgroups, self._end)
        self._graves = Graves(cgroups, loop)
        self._served = ServedFiles(config, wright, loop, self._measured, self._end)
        self._shares = Shares(cgroups, loop, self._served.measure)
        self._guards = Guards(config, loop, tell, self._end, lambda: self._served.pid)
        self._networks = Networks()
        self._cells: dict[str, Cell] = {}
        self._shells = Shells(config, wright, cgroups, self._cells, self._watch_shell)
        self._when_empty: Callable[[], None] | None = None

    def jail_ids(self) -> list[str]:
        """Of those that a daemon may adopt."""
        cells = self._cells.values()
        return sorted(c.jail_id for c in cells if isinstance(c.phase, Running) and not c.is_daemons)

    def needs_directory(self, jail_id: str) -> bool:
        """Does it run, is its uid the owner of a jail's user namespace, or does a jail show its state?"""
        return (
            jail_id in self._cells
            or jail_id in self._graves
            or any(jail_id in (c.owner, c.request.packages) for c in self._cells.values())
        )

    def measure(self) -> None:
        """The disk has lost room: who is to blame?"""
        for cell in self._cells.values():
            if not cell.is_daemons:
                with suppress(OSError):  # its groups are just going
                    self._shares.measure(cell)

    def end_daemons_own(self) -> None:
        """The next daemon has its own zygotes, and nobody waits for the tasks any more, nor for what is still
        being made, which the next one does not see when it looks for jails to adopt. Nor does anybody fill
        what is guarded."""
        for cell in list(self._cells.values()):
            if cell.is_daemons or isinstance(cell.phase, Making) or self._guards.has(cell):
                self._kill(cell, None)

    # --- requests ------------------------------------------------------------------------------------

    def make(self, request_id: int, request: protocol.Make) -> None:
        """Answers when init is ready, or nothing is left of the attempt. Refused for what is no attempt."""
        jail_id = request.jail_id
        if jail_id in self._cells or jail_id in self._graves:
            raise Refused(f"jail {jail_id} runs already", "kill it first, or adopt it")
        if request.packages in self._cells:  # what its agent wrote would change under its readers
            raise Refused(f"jail {request.packages} still runs, so its state can't be shown to others")
        ground = Ground()
        try:
            carry_out(ground_steps(request, self._directories, self._cgroups, ground), note)
            cell = self._begin(request, ground.slot, Making(request_id))
        except (OSError, Refused) as error:
            refused = error if isinstance(error, Refused) else Refused(f"make of {jail_id}: {error}")
            self._bury_unborn(request_id, request, ground, refused)
            return
        self._cells[jail_id] = cell
        seconds = IMPORT_SECONDS if cell.is_zygote else MAKE_SECONDS
        cell.patience = self._loop.after(seconds, lambda: self._give_up_making(cell, seconds))
        if cell.born:
            self._settle(cell)

    def _bury_unborn(self, request_id: int, request: protocol.Make, ground: Ground, refused: Refused) -> None:
        def gone() -> None:
            if request.way is Way.TASK and ground.slot >= 0:
                self._directories.give_back(ground.slot)
            self._refuse(request_id, refused)
            self._check_empty()

        self._graves.bury(request.jail_id, gone, unborn=True)

    def _begin(self, request: protocol.Make, slot: int, phase: Making) -> Cell:
        match request.way:
            case Way.EXEC | Way.TASK:
                init = spawn.spawn(request, self._wright, self._cgroups)
            case Way.ZYGOTE:
                uid = self._config.agent_uid(slot)
                init = spawn_zygote.spawn_zygote(request, self._wright, self._cgroups, uid)
            case Way.FORK:
                cell = self._shells.ready(request, self._zygote_of(request))
                del self._cells[cell.jail_id]
                cell.jail_id, cell.request, cell.slot, cell.phase = request.jail_id, request, slot, phase
                return cell
            case _:
                assert_never(request.way)
        cell = Cell(request.jail_id, request, slot, init, phase)
        self._loop.watch(cell.supervisor, lambda: self._hear(cell))
        self._loop.on_child(init.pid, lambda code: self._reaped(cell))
        return cell

    def _zygote_of(self, request: protocol.Make) -> Cell:
        """Refused if it does not run. One of another version would get power over this jail."""
        zygote = self._cells.get(request.zygote)
        if zygote is None or not zygote.is_zygote or not isinstance(zygote.phase, Running):
            raise Refused(f"there is no zygote {request.zygote}")
        if zygote.request.bundle != request.bundle:
            raise Refused(f"zygote {request.zygote} is not of version {request.bundle}")
        return zygote

    def of_jail(self, request_id: int, request: protocol.OfJail) -> None:
        """Refused if there is no such jail, or it is no more than ending."""
        cell = self._cells.get(request.jail_id)
        if cell is not None and isinstance(request, protocol.Kill):
            self._kill(cell, request_id)
            return
        if cell is None or not isinstance(cell.phase, Running):
            raise Refused(f"jail {request.jail_id} does not run")
        if cell.is_zygote:
            raise Refused(f"{request.jail_id} is a zygote: it can only be killed")
        match request:
            case protocol.Fork():
                self._fork(cell, request_id)
            case protocol.Attach():
                self._attach(cell, request_id)
            case protocol.Measure():
                self._ok(request_id, **dataclasses.asdict(self._cgroups.usage(cell.jail_id)))
            case protocol.Resize():
                self._shares.resize(cell, request, lambda refused: self._done(request_id, refused))
            case protocol.Listen() | protocol.Connect():
                self._answer(request_id, {"ok": {}}, (self._networks.socket_in(cell.pid, request),))
            case protocol.Kill():
                raise AssertionError("handled above")
            case _:
                assert_never(request)

    def of_file(self, request_id: int, request: protocol.OfFile, fds: tuple[int, ...]) -> None:
        """Refused, or OSError. The descriptors stay the caller's."""
        self._guards.of_file(self._cells.get(request.jail_id), request, fds)
        self._ok(request_id)

    def close(self) -> None:
        self._served.close()

    def kill_all(self, when_empty: Callable[[], None]) -> None:
        self._when_empty = when_empty
        for cell in list(self._cells.values()):
            self._kill(cell, None)
        self._check_empty()

    # --- a jail's life ---------------------------------------------------------------------------------

    def _hear(self, cell: Cell) -> None:
        try:
            cell.supervisor.flush()
            for frame in cell.supervisor.receive():
                frame.close()
                self._heard(cell, frame.body)
        except (Closed, Garbage):
            self._loop.unwatch(cell.supervisor)
            if not isinstance(cell.phase, Dying):
                self._end(cell)

    def _heard(self, cell: Cell, body: dict[str, Any]) -> None:
        match body:
            case {"step": spawn.READY} if isinstance(cell.phase, Making) and cell.is_zygote:
                request, cell.phase = cell.phase.request, Running()
                self._made(cell)
                self._ok(request)
            case {"step": spawn.FAILED, "message": str(message), "hint": str(hint)}:
                self._fail_making(cell, Refused(message[:1000], hint[:1000]))
            case {"step": spawn.READY} if isinstance(cell.phase, Dying):
                pass  # it was just too late
            case _ if cell.is_zygote:
                log.error("zygote %s said %.200r, which means nothing", cell.jail_id, body)
            case {"step": spawn.BORN, "pid": int(pid)}:
                self._born(cell, pid)
            case {"step": spawn.IN_USER_NAMESPACE}:
                ids = MapIds(cell.init.pid, self._config.init_uid(cell.slot))
                try:
                    carry_out((ids,), cell.init.progress.note)
                    cell.supervisor.send({"do": "go on"})
                except Refused as refused:
                    self._fail_making(cell, refused)
            case {"step": spawn.READY} if isinstance(cell.phase, Making):
                self._hand_over(cell, cell.phase.request)
            case {"ended": int(code), "stderr_tail": str(tail)}:
                cell.code, cell.stderr_tail = code, tail
                cell.disk_full = body.get("disk_full") is True
            case {"measured": True}:
                self._measured(cell, over=False)
            case _:
                log.error("jail %s: init said %.200r, which means nothing", cell.jail_id, body)

    def _made(self, cell: Cell) -> None:
        if log.isEnabledFor(logging.DEBUG):
            for line in cell.init.progress.lines():
                log.debug("%s", line)
        cell.init.progress.close()
        cell.calm()

    def _hand_over(self, cell: Cell, request_id: int) -> None:
        self._made(cell)
        try:
            self._served.begin(cell)
            self._attach(cell, request_id)
        except OSError as error:
            refused = Refused(
                f"jail {cell.jail_id} can't be handed over: {error}",
                "have all of the node's descriptors been used up? its service may have more: LimitNOFILE",
            )
            self._fail_making(cell, refused)
            return
        except Closed:
            self._fail_making(cell, Refused("who was to serve its files has just ended", "try again"))
            return
        cell.phase = Running()

    def _attach(self, cell: Cell, request_id: int) -> None:
        """Closed, or OSError: then it is as it was."""
        fds = cell.open_for_daemon(self._cgroups, lambda fd: self._served.control(cell, fd))
        granted = cell.request.limits
        sizes = {name: getattr(granted, name) for name in ("memory_bytes", "cpu_millis", "pids")}
        self._answer(request_id, {"ok": {**sizes, "devices": cell.request.devices}}, fds)

    def _measured(self, cell: Cell, over: bool) -> None:
        self._shares.measured(cell)
        if over and isinstance(cell.phase, Running):
            cell.disk_full = True
            self._end(cell)

    def _give_up_making(self, cell: Cell, seconds: float) -> None:
        if isinstance(cell.phase, Making):
            self._fail_making(
                cell,
                Refused(
                    f"making the jail took more than {seconds:g} s; it had come to: "
                    f"{cell.init.progress.read() or 'nothing'}",
                    "is the machine overloaded?",
                ),
            )

    def _fail_making(self, cell: Cell, refused: Refused) -> None:
        match cell.phase:
            case Making(request):
                cell.phase = Dying(request, refused.body())
                self._end(cell)
            case Waiting():
                log.error("a shell for %s can't be made: %s", cell.owner, refused.message)
                self._end(cell)

    # --- shells ------------------------------------------------------------------------------------------

    def _watch_shell(self, cell: Cell) -> None:
        self._loop.watch(cell.supervisor, lambda: self._hear(cell))
        self._loop.on_child(cell.init.pid, lambda code: self._built(cell))

    def _keep_shell(self, request: protocol.Make) -> None:
        """Has one wait for the next request like `request`, and none that its zygote had for others."""
        if self._when_empty is not None:
            return
        for misfit in self._shells.misfits(request):
            self._end(misfit)
        try:
            self._shells.ready(request, self._zygote_of(request))
        except (OSError, Refused) as error:  # the next request tells who waits for it
            log.info("no shell for %s: %s", request.zygote, error)

    def _settle(self, cell: Cell) -> None:
        try:
            self._shells.settle(cell)
        except Refused as refused:
            self._fail_making(cell, refused)

    def _born(self, cell: Cell, pid: int) -> None:
        """Init is there, as our own child; the builder that says so ends."""
        cell.pid = pid
        self._loop.on_child(pid, lambda code: self._reaped(cell))
        if isinstance(cell.phase, Dying):
            cell.kill()
        if not kernel.exists(pid):  # it was reaped before we knew it
            self._loop.forget_child(pid)
            self._reaped(cell)
            return
        if isinstance(cell.phase, Making):
            self._settle(cell)
        zygote = self._cells.get(cell.owner)
        if zygote is not None and not isinstance(cell.phase, Dying):
            self._forks.prepare(cell, zygote)

    def _built(self, cell: Cell) -> None:
        """The builder has ended. What it said may still be unread."""
        self._hear(cell)
        if not cell.born:  # and never will be
            self._reaped(cell)

    def _fork(self, cell: Cell, request_id: int) -> None:
        def done(refused: Refused | None) -> None:
            if refused is not None:
                self._refuse(request_id, refused)
                return
            self._ok(request_id)
            self._loop.after(_SHELL_PAUSE, lambda: self._keep_shell(cell.request))

        self._forks.start(cell, done)

    # --- the end -----------------------------------------------------------------------------------------

    def _kill(self, cell: Cell, request_id: int | None) -> None:
        if request_id is not None:
            cell.killers.append(request_id)
        if not isinstance(cell.phase, Dying):
            cell.was_killed = True
            self._end(cell)

    def _end(self, cell: Cell) -> None:
        """Kills what is left, frozen or not. `_reaped` goes on when init, and so all, has ended."""
        match cell.phase:
            case Waiting():
                cell.phase = Dying(failure=Refused("nobody has heard of it").body())
            case Making(request):
                cell.phase = Dying(request, Refused("the jail ended while it was made").body())
            case Running():
                cell.phase = Dying()
            case Dying():
                pass
            case _:
                assert_never(cell.phase)
        self._graves.strike(cell)

    def _reaped(self, cell: Cell) -> None:
        cell.reaped = True
        try:
            while True:
                frames = cell.supervisor.receive()
                if not frames:
                    break
                for frame in frames:
                    self._heard(cell, frame.body)
        except (Closed, Garbage):
            pass
        self._loop.unwatch(cell.supervisor)
        self._forks.forget(cell)
        self._guards.forget(cell)
        if not isinstance(cell.phase, Dying):
            self._end(cell)
        for shell in self._shells.of(cell.jail_id):
            self._end(shell)
        self._served.end(cell, lambda tail: self._bury(cell, tail))

    def _bury(self, cell: Cell, tail: str) -> None:
        cell.stderr_tail = tail or cell.stderr_tail
        try:
            oom_kills = self._cgroups.oom_kills(cell.jail_id)
        except OSError:  # there is no descriptor left for it, say: then nobody knows
            oom_kills = 0
        ended = cell.ended(oom_kills)
        cell.close()
        self._graves.bury(cell.jail_id, lambda: self._gone(cell, ended))

    def _gone(self, cell: Cell, ended: protocol.Ended) -> None:
        del self._cells[cell.jail_id]
        if cell.is_task:
            self._directories.give_back(cell.slot)
        self._tell_end(cell, ended)
        self._check_empty()

    def _tell_end(self, cell: Cell, ended: protocol.Ended) -> None:
        fields = dataclasses.asdict(ended)
        if isinstance(cell.phase, Dying) and cell.phase.failure is not None:
            if cell.phase.request is not None:
                self._answer(cell.phase.request, {"error": cell.phase.failure}, ())
        else:
            self._tell({"event": "exited", "jail_id": cell.jail_id, **fields})
        for request_id in cell.killers:
            self._ok(request_id, **fields)

    def _check_empty(self) -> None:
        if self._when_empty is not None and not self._cells and self._graves.empty:
            self._when_empty()

    def _ok(self, request_id: int, **fields: Any) -> None:
        self._answer(request_id, {"ok": fields}, ())

    def _done(self, request_id: int, refused: Refused | None) -> None:
        if refused is None:
            self._ok(request_id)
        else:
            self._refuse(request_id, refused)

    def _refuse(self, request_id: int, refused: Refused) -> None:
        self._answer(request_id, {"error": refused.body()}, ())
