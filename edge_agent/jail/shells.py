"""Shells: jails for zygotes' forks that are built before somebody wants one. See `spawn_shell`.

What must hold: a shell is taken once, for a request that it fits in all that was built; it ends with its
zygote, to whose uid it belongs. None is ever needed: where none waits, one is begun.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from edge_agent.jail import spawn_shell
from edge_agent.jail.cell import Cell, Waiting
from edge_agent.jail.cgroups.base import Cgroups
from edge_agent.jail.config import JailerConfig
from edge_agent.jail.operations import carry_out
from edge_agent.jail.protocol import Make
from edge_agent.jail.steps import MapIds
from edge_agent.jail.wright import Wright


class Shells:
    """Among `cells`, those that wait. `watch` gets each new one."""

    def __init__(
        self,
        config: JailerConfig,
        wright: Wright,
        cgroups: Cgroups,
        cells: dict[str, Cell],
        watch: Callable[[Cell], None],
    ) -> None:
        self._config = config
        self._wright = wright
        self._cgroups = cgroups
        self._cells = cells
        self._watch = watch
        self._begun = 0

    def of(self, zygote: str) -> list[Cell]:
        return [c for c in self._cells.values() if isinstance(c.phase, Waiting) and c.owner == zygote]

    def ready(self, request: Make, zygote: Cell) -> Cell:
        """One that fits `request`; it waits already, or is begun now. OSError if there can be none."""
        template = _template(request)
        for cell in self.of(zygote.jail_id):
            if cell.request == template:
                return cell
        init = spawn_shell.spawn_shell(template, self._wright, self._config.agent_uid(zygote.slot))
        self._begun += 1
        cell = Cell(f".shell-{self._begun}", template, -1, init, Waiting(), zygote.jail_id)
        self._cells[cell.jail_id] = cell
        self._watch(cell)
        return cell

    def misfits(self, request: Make) -> list[Cell]:
        """Those of its zygote that were built for other requests."""
        template = _template(request)
        return [cell for cell in self.of(request.zygote) if cell.request != template]

    def settle(self, cell: Cell) -> None:
        """It becomes the jail that `cell.request` wants. PlanFailed if it has ended, or is refused."""
        ids = MapIds(cell.pid, self._config.init_uid(cell.slot))
        steps = spawn_shell.settling(cell.request, lambda: cell.init, ids, self._cgroups, self._config)
        carry_out(steps, cell.init.progress.note)


def _template(request: Make) -> Make:
    """What is the same for all jails that one shell fits."""
    return dataclasses.replace(request, jail_id="shell", argv=("/shell",), env=())
