"""Keeps the jails: makes, watches, freezes and ends them. Nothing here waits; what takes time goes on in the
loop's callbacks, and the answer is given there.

What must hold: a request gets exactly one answer; a jail that ended leaves neither process, cgroup nor
descriptor; its end is told once. How it can fail: the kernel refuses an operation (answered with the
operation's name), or a jail does not end (logged every few seconds, and tried again).
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any, assert_never

from edge_agent.jail import protocol, roots, seccomp, spawn, spawn_zygote
from edge_agent.jail.agent_process import LIMITS, environment
from edge_agent.jail.cell import Cell, Dying, Making, Running
from edge_agent.jail.cgroups.base import Cgroups
from edge_agent.jail.config import JailerConfig
from edge_agent.jail.directories import Directories
from edge_agent.jail.loop import Loop
from edge_agent.jail.protocol import Refused, Way
from edge_agent.jail.wire import Closed, Garbage, Wire, close_all, pair

log = logging.getLogger(__name__)

MAKE_SECONDS = 10.0
IMPORT_SECONDS = 60.0  # of a zygote
_FREEZE_SECONDS, _FREEZE_POLL = 5.0, 0.002
_REMOVE_POLL, _REMOVE_COMPLAIN = 0.005, 1000

# How an answer is given: the request's id, the frame's body, descriptors that are given away.
Answer = Callable[[int, dict[str, Any], tuple[int, ...]], None]


class Keeper:
    """`answer` and `tell` reach whatever daemon there is now, or nobody."""

    def __init__(
        self,
        config: JailerConfig,
        system: roots.System,
        cgroups: Cgroups,
        directories: Directories,
        loop: Loop,
        answer: Answer,
        tell: Callable[[dict[str, Any]], None],
    ) -> None:
        self._config = config
        self._system = system
        self._cgroups = cgroups
        self._directories = directories
        self._loop = loop
        self._answer = answer
        self._tell = tell
        self._cells: dict[str, Cell] = {}
        self._when_empty: Callable[[], None] | None = None

    def jail_ids(self) -> list[str]:
        """Of those that a daemon may adopt."""
        return sorted(i for i, c in self._cells.items() if isinstance(c.phase, Running) and not c.is_zygote)

    def needs_directory(self, jail_id: str) -> bool:
        """Does it run, or is its uid the owner of a jail's user namespace?"""
        return jail_id in self._cells or any(c.owner == jail_id for c in self._cells.values())

    def end_zygotes(self) -> None:
        """The next daemon has its own."""
        for cell in list(self._cells.values()):
            if cell.is_zygote:
                self._kill(cell, None)

    # --- requests ------------------------------------------------------------------------------------

    def make(self, request_id: int, request: protocol.Make) -> None:
        """Answers when init is ready. Refused or OSError at once for what can be known at once."""
        jail_id = request.jail_id
        if jail_id in self._cells:
            raise Refused(f"jail {jail_id} runs already", "kill it first, or adopt it")
        slot = self._directories.ensure(jail_id)
        try:
            self._cgroups.create(jail_id, request.limits)
            init = self._spawn(request, slot)
        except (OSError, Refused):
            self._cgroups.remove(jail_id)
            raise
        cell = Cell(jail_id, request, slot, init, Making(request_id), request.zygote)
        self._cells[jail_id] = cell
        self._loop.watch(cell.supervisor, lambda: self._hear(cell))
        if request.way is Way.FORK:
            self._loop.on_child(init.pid, lambda code: self._built(cell))
        else:
            self._loop.on_child(init.pid, lambda code: self._reaped(cell))
        seconds = IMPORT_SECONDS if cell.is_zygote else MAKE_SECONDS
        self._loop.after(seconds, lambda: self._give_up_making(cell, seconds))

    def _spawn(self, request: protocol.Make, slot: int) -> spawn.Spawned:
        match request.way:
            case Way.EXEC:
                plan = roots.jail_plan(request, self._system, self._config)
                return spawn.spawn(request, plan, self._cgroups)
            case Way.ZYGOTE:
                plan = roots.zygote_plan(request, self._system, self._config)
                uid = self._config.agent_uid(slot)
                return spawn_zygote.spawn_zygote(request, plan, self._cgroups, uid)
            case Way.FORK:
                zygote = self._zygote_of(request)
                walls = spawn_zygote.Walls(
                    roots.jail_mounts(request, self._system, self._config),
                    roots.jail_names(request),
                    owner=self._config.agent_uid(zygote.slot),
                    init_uid=self._config.init_uid(slot),
                )
                return spawn_zygote.spawn_for_fork(request, walls, self._cgroups)
            case _:
                assert_never(request.way)

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
            case protocol.Freeze():
                self._cgroups.freeze(cell.jail_id)
                self._poll_frozen(cell, request_id, round(_FREEZE_SECONDS / _FREEZE_POLL))
            case protocol.Thaw():
                self._cgroups.thaw(cell.jail_id)
                self._ok(request_id)
            case protocol.Measure():
                self._ok(request_id, **dataclasses.asdict(self._cgroups.usage(cell.jail_id)))
            case protocol.Kill():
                raise AssertionError("handled above")
            case _:
                assert_never(request)

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
                self._ok(request)
            case {"step": spawn.FAILED, "message": str(message), "hint": str(hint)}:
                self._fail_making(cell, Refused(message[:1000], hint[:1000]))
            case _ if cell.is_zygote:
                log.error("zygote %s said %.200r, which means nothing", cell.jail_id, body)
            case {"step": spawn.BORN, "pid": int(pid)}:
                self._born(cell, pid)
            case {"step": spawn.IN_USER_NAMESPACE}:
                try:
                    spawn.write_id_maps(cell.init.pid, self._config.init_uid(cell.slot))
                    cell.supervisor.send({"do": "go on"})
                except OSError as error:
                    self._fail_making(cell, Refused(f"write the jail's uid map: {error.strerror}"))
            case {"step": spawn.READY} if isinstance(cell.phase, Making):
                self._attach(cell, cell.phase.request)
                cell.phase = Running()
            case {"ended": int(code), "stderr_tail": str(tail)}:
                cell.code, cell.stderr_tail = code, tail
            case _:
                log.error("jail %s: init said %.200r, which means nothing", cell.jail_id, body)

    def _attach(self, cell: Cell, request_id: int) -> None:
        fds = cell.sockets_for_daemon()
        self._loop.refresh(cell.supervisor)
        self._answer(request_id, {"ok": {}}, fds)

    def _give_up_making(self, cell: Cell, seconds: float) -> None:
        if isinstance(cell.phase, Making):
            step = cell.init.steps[cell.init.progress[0]].describe()
            self._fail_making(
                cell,
                Refused(
                    f"making the jail took more than {seconds:g} s; it had come to: {step}",
                    "is the machine overloaded?",
                ),
            )

    def _fail_making(self, cell: Cell, refused: Refused) -> None:
        if isinstance(cell.phase, Making):
            cell.phase = Dying(cell.phase.request, refused.body())
            self._end(cell)

    # --- zygotes and what they fork ---------------------------------------------------------------------

    def _born(self, cell: Cell, pid: int) -> None:
        """Init is there, as our own child; the builder that says so ends."""
        cell.pid = pid
        self._loop.on_child(pid, lambda code: self._reaped(cell))
        if isinstance(cell.phase, Dying):
            cell.kill()
        if not _exists(pid):  # it was reaped before we knew it
            self._loop.forget_child(pid)
            self._reaped(cell)

    def _built(self, cell: Cell) -> None:
        """The builder has ended. What it said may still be unread."""
        self._hear(cell)
        if cell.pid == cell.init.pid:  # there never was an init
            self._reaped(cell)

    def _fork(self, cell: Cell, request_id: int) -> None:
        if not cell.for_fork:
            raise Refused(f"jail {cell.jail_id} can't be forked into (again)")
        zygote = self._zygote_of(cell.request)
        ours, theirs = pair()
        opened = spawn_zygote.open_namespaces(cell.pid)
        try:
            groups = self._cgroups.open_from_outside(cell.jail_id)
        except OSError:
            close_all(opened)
            raise
        given, cell.for_fork = cell.for_fork, ()
        body = {
            "do": "fork",
            "env": environment(cell.request),
            "uid": protocol.AGENT_ID,
            "limits": LIMITS,
            "filter": seccomp.agent_filter().hex(),
        }
        report = Wire(ours)
        self._loop.watch(report, lambda: self._hear_fork(cell, report, request_id))
        zygote.supervisor.send(body, (theirs.detach(), *given, *opened, *groups))
        self._loop.refresh(zygote.supervisor)

    def _hear_fork(self, cell: Cell, report: Wire, request_id: int) -> None:
        """What the zygote's child says. It lives until we close; so long the agent's end waits for us."""
        try:
            frames = report.receive()
            if not frames:
                return
            body = frames[0].body
        except (Closed, Garbage):
            body = {"problem": "the zygote ended as it forked"}
        self._loop.unwatch(report)
        match body:
            case {"pid": int(pid)} if spawn_zygote.is_in_jail(pid, cell.pid) and not self._loop.knows(pid):
                self._loop.on_child(pid, lambda code: self._agent_ended(cell, code))
                self._ok(request_id)
            case {"problem": str(problem)}:
                self._refuse(request_id, Refused(problem[:1000]))
            case _:
                self._refuse(request_id, Refused(f"jail {cell.jail_id} has ended, or got no agent"))
        report.close()

    def _agent_ended(self, cell: Cell, code: int) -> None:
        if cell.reaped:
            return
        cell.code = code
        with suppress(Closed):
            cell.supervisor.send({"do": "agent ended", "code": code})
            self._loop.refresh(cell.supervisor)

    def _kill(self, cell: Cell, request_id: int | None) -> None:
        if request_id is not None:
            cell.killers.append(request_id)
        if not isinstance(cell.phase, Dying):
            cell.was_killed = True
            self._end(cell)

    def _end(self, cell: Cell) -> None:
        """Kills what is left, frozen or not. `_reaped` goes on when init, and so all, has ended."""
        match cell.phase:
            case Making(request):
                cell.phase = Dying(request, Refused("the jail ended while it was made").body())
            case Running():
                cell.phase = Dying()
            case Dying():
                pass
            case _:
                assert_never(cell.phase)
        if not cell.reaped:
            cell.kill()
        self._cgroups.kill(cell.jail_id)

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
        if not isinstance(cell.phase, Dying):
            self._end(cell)
        ended = cell.ended(self._cgroups.oom_kills(cell.jail_id))
        cell.close()
        self._remove(cell, ended, 0)

    def _remove(self, cell: Cell, ended: protocol.Ended, tries: int) -> None:
        if not self._cgroups.remove(cell.jail_id):
            if tries % _REMOVE_COMPLAIN == _REMOVE_COMPLAIN - 1:
                log.error("jail %s: its control group can't be removed yet", cell.jail_id)
                self._cgroups.kill(cell.jail_id)
            self._loop.after(_REMOVE_POLL, lambda: self._remove(cell, ended, tries + 1))
            return
        del self._cells[cell.jail_id]
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

    def _poll_frozen(self, cell: Cell, request_id: int, tries: int) -> None:
        if not isinstance(cell.phase, Running):
            self._refuse(request_id, Refused(f"jail {cell.jail_id} ended"))
        elif self._cgroups.frozen(cell.jail_id):
            self._ok(request_id)
        elif tries == 0:
            self._cgroups.thaw(cell.jail_id)
            self._refuse(
                request_id,
                Refused(
                    f"the processes of jail {cell.jail_id} did not stop in {_FREEZE_SECONDS:g} s",
                    "they may wait for a disk; it was thawed again",
                ),
            )
        else:
            self._loop.after(_FREEZE_POLL, lambda: self._poll_frozen(cell, request_id, tries - 1))

    def _check_empty(self) -> None:
        if self._when_empty is not None and not self._cells:
            self._when_empty()

    def _ok(self, request_id: int, **fields: Any) -> None:
        self._answer(request_id, {"ok": fields}, ())

    def _refuse(self, request_id: int, refused: Refused) -> None:
        self._answer(request_id, {"error": refused.body()}, ())


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
