"""Tables of a mesh's status: with colours and bars on a terminal, plain columns for programs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from protos.v1 import admin_pb2, common_pb2
from roost.cli._common import printable
from shared.units import format_size

_BAR_CELLS = 8
_STATES = {"up": "green", "suspect": "yellow", "draining": "yellow", "lost": "red"}
_PHASES = {"live": "green", "placed": "cyan", "hibernated": "dim"}


@dataclass(frozen=True, slots=True)
class Cell:
    text: str
    style: str = ""


@dataclass(frozen=True, slots=True)
class Grid:
    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    empty: str  # what to say if there are no rows


def nodes(status: admin_pb2.StatusReply) -> Grid:
    headers = ("node", "role", "site", "state", "memory", "cpu", "instances", "load", "rtt")
    rows = tuple(_node(node) for node in sorted(status.nodes, key=lambda n: (n.node.role, n.node.id)))
    return Grid("nodes", headers, rows, "no node has joined yet")


def instances(status: admin_pb2.StatusReply) -> Grid:
    headers = ("user", "agent", "node", "epoch", "version", "phase", "why")
    ordered = sorted(status.instances, key=lambda i: (i.key.tenant, i.key.agent, i.key.user))
    return Grid("instances", headers, tuple(_instance(i) for i in ordered), "no user has an instance yet")


def parked(status: admin_pb2.StatusReply) -> Grid:
    """Turns that wait until somebody says what became of a call."""
    rows = tuple(
        (Cell(i.key.user, "bold"), Cell(i.key.agent), Cell(i.parked, "red"))
        for i in status.instances
        if i.parked
    )
    return Grid("parked turns: roost effects AGENT --user U", ("user", "agent", "uncertain call"), rows, "")


def timers(status: admin_pb2.StatusReply) -> Grid:
    """What falls due when, the soonest first, and what failed."""
    rows = tuple(
        (
            Cell(instance.key.user, "bold"),
            Cell(instance.key.agent),
            Cell(timer.name),
            Cell(datetime.fromtimestamp(timer.due_unix).astimezone().isoformat(" ", "seconds")),
            Cell(str(timer.attempts)),
            Cell("failed" if timer.failed else "waits", "red" if timer.failed else ""),
            Cell(timer.error),
        )
        for instance, timer in sorted(
            ((i, timer) for i in status.instances for timer in i.timers), key=lambda pair: pair[1].due_unix
        )
    )
    headers = ("user", "agent", "timer", "due", "attempts", "state", "error")
    return Grid("timers", headers, rows, "")


def agents(status: admin_pb2.StatusReply) -> Grid:
    rows = tuple(
        (Cell(agent.name, "bold"), Cell(agent.tenant), Cell(agent.version[:12]))
        for agent in sorted(status.agents, key=lambda a: (a.tenant, a.name))
    )
    return Grid("agents", ("agent", "tenant", "version"), rows, "no agent is deployed yet: roost deploy DIR")


def addresses(status: admin_pb2.StatusReply) -> Grid:
    rows = tuple(
        (
            Cell(node.node.id, "bold"),
            Cell(node.node.address),
            Cell(_position(node.node)),
            Cell(node.coordinator),
            Cell(", ".join(node.peers) or "–"),
        )
        for node in sorted(status.nodes, key=lambda n: n.node.id)
    )
    return Grid("addresses", ("node", "address", "position", "coordinator", "hears"), rows, "")


def show(*grids: Grid) -> None:
    """Prints the grids; those without rows say so in a line, or are left out."""
    console = Console(highlight=False)
    for grid in grids:
        if not grid.rows:
            if grid.empty:
                console.print(Text(grid.empty, "dim"))
        elif console.is_terminal:
            console.print(rich_table(grid))
        else:
            sys.stdout.write(plain_table(grid) + "\n")


def together(*grids: Grid) -> RenderableType:
    return Group(*(rich_table(g) if g.rows else Text(g.empty, "dim") for g in grids))


def rich_table(grid: Grid) -> Table:
    table = Table(title=grid.title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    for header in grid.headers:
        table.add_column(header, header_style="dim", no_wrap=header != "why", overflow="fold")
    for row in grid.rows:
        table.add_row(*(Text(printable(cell.text), cell.style) for cell in row))
    return table


def plain_table(grid: Grid) -> str:
    lines = [grid.headers, *(tuple(cell.text for cell in row) for row in grid.rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(_plain_line(line, widths) for line in lines) + "\n"


def bar(used: int, total: int) -> str:
    filled = min(_BAR_CELLS, round(_BAR_CELLS * used / total)) if total else 0
    return "█" * filled + "░" * (_BAR_CELLS - filled)


def _plain_line(line: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()


def _node(status: admin_pb2.NodeStatus) -> tuple[Cell, ...]:
    node, used = status.node, status.reserved
    memory = f"{format_size(used.memory_bytes)}/{format_size(node.capacity.memory_bytes)}"
    cpu = f"{used.cpu_millis / 1000:g}/{node.capacity.cpu_millis / 1000:g}"
    return (
        Cell(node.id, "bold"),
        Cell(common_pb2.Role.Name(node.role).lower(), "cyan" if node.role == common_pb2.CLOUD else ""),
        Cell(node.site),
        Cell(status.state, _STATES.get(status.state, "")),
        Cell(f"{bar(used.memory_bytes, node.capacity.memory_bytes)} {memory}"),
        Cell(f"{bar(used.cpu_millis, node.capacity.cpu_millis)} {cpu}"),
        Cell(str(status.instances)),
        Cell("–" if status.load < 0 else f"{status.load:.2f}"),
        Cell("–" if status.rtt_ms < 0 else f"{status.rtt_ms:.1f} ms"),
    )


def _instance(status: admin_pb2.InstanceStatus) -> tuple[Cell, ...]:
    return (
        Cell(status.key.user, "bold"),
        Cell(status.key.agent),
        Cell(status.node),
        Cell(str(status.epoch)),
        Cell(str(status.version)),
        Cell(status.phase, _PHASES.get(status.phase, "")),
        Cell(status.why),
    )


def _position(node: common_pb2.NodeInfo) -> str:
    if not node.HasField("position"):
        return "–"
    return f"{node.position.latitude:.2f}, {node.position.longitude:.2f}"
