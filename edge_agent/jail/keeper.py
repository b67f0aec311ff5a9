"""Keeps the jails: makes, watches, freezes and ends them. Nothing here waits; what takes time goes on in the
loop's callbacks, and the answer is given there.

What must hold: a request gets exactly one answer; a jail that ended leaves neither process, cgroup nor
descriptor; its end is told once. How it can fail: the kernel refuses an operation (answered with the
operation's name), or a jail does not end (logged every few seconds, and tried again).
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any, assert_never

from edge_agent.jail import protocol, roots, spawn
from edge_agent.jail.cell import Cell, Dying, Making, Running
from edge_agent.jail.cgroups.base import Cgroups
from edge_agent.jail.config import JailerConfig
from edge_agent.jail.directories import Directories
from edge_agent.jail.loop import Loop
from edge_agent.jail.protocol import Refused
from edge_agent.jail.wire import Closed, Garbage

log = logging.getLogger(__name__)

MAKE_SECONDS = 10.0
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
        return sorted(i for i, c in self._cells.items() if isinstance(c.phase, Running))

    def is_there(self, jail_id: str) -> bool:
        return jail_id in self._cells

    # --- requests ------------------------------------------------------------------------------------

    def make(self, request_id: int, request: protocol.Make) -> None:
        """Answers when init is ready. Refused or OSError at once for what can be known at once."""
        jail_id = request.jail_id
        if jail_id in self._cells:
            raise Refused(f"jail {jail_id} runs already", "kill it first, or adopt it")
        slot = self._directories.ensure(jail_id)
        plan = roots.jail_plan(request, self._system, self._config)
        try:
            self._cgroups.create(jail_id, request.limits)
            init = spawn.spawn(request, plan, self._cgroups)
        except OSError:
            self._cgroups.remove(jail_id)
            raise
        cell = Cell(jail_id, slot, init, Making(request_id))
        self._cells[jail_id] = cell
        self._loop.watch(cell.supervisor, lambda: self._hear(cell))
        self._loop.on_child(init.pid, lambda code: self._reaped(cell))
        self._loop.after(MAKE_SECONDS, lambda: self._give_up_making(cell))

    def of_jail(self, request_id: int, request: protocol.OfJail) -> None:
        """Refused if there is no such jail, or it is no more than ending."""
        cell = self._cells.get(request.jail_id)
        if cell is not None and isinstance(request, protocol.Kill):
            self._kill(cell, request_id)
            return
        if cell is None or not isinstance(cell.phase, Running):
            raise Refused(f"jail {request.jail_id} does not run")
        match request:
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
            case {"step": spawn.IN_USER_NAMESPACE}:
                try:
                    spawn.write_id_maps(cell.init.pid, self._config.init_uid(cell.slot))
                    cell.supervisor.send({"do": "go on"})
                except OSError as error:
                    self._fail_making(cell, Refused(f"write the jail's uid map: {error.strerror}"))
            case {"step": spawn.READY} if isinstance(cell.phase, Making):
                self._attach(cell, cell.phase.request)
                cell.phase = Running()
            case {"step": spawn.FAILED, "message": str(message), "hint": str(hint)}:
                self._fail_making(cell, Refused(message, hint))
            case {"ended": int(code), "stderr_tail": str(tail)}:
                cell.code, cell.stderr_tail = code, tail
            case _:
                log.error("jail %s: init said %.200r, which means nothing", cell.jail_id, body)

    def _attach(self, cell: Cell, request_id: int) -> None:
        fds = cell.sockets_for_daemon()
        self._loop.refresh(cell.supervisor)
        self._answer(request_id, {"ok": {}}, fds)

    def _give_up_making(self, cell: Cell) -> None:
        if isinstance(cell.phase, Making):
            step = cell.init.steps[cell.init.progress[0]].describe()
            self._fail_making(
                cell,
                Refused(
                    f"making the jail took more than {MAKE_SECONDS:g} s; it had come to: {step}",
                    "is the machine overloaded?",
                ),
            )

    def _fail_making(self, cell: Cell, refused: Refused) -> None:
        if isinstance(cell.phase, Making):
            cell.phase = Dying(cell.phase.request, refused.body())
            self._end(cell)

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
