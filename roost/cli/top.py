"""`roost top`: the mesh as it changes. q or Ctrl-C leaves."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from protos.v1 import admin_pb2
from roost._mesh import Coordinators
from roost.cli import _tables
from roost.cli._common import Commands, add_command, coordinators_of, printable
from roost.cli.status import fetch
from shared.errors import Reason, RoostError

_PERIOD = 1.0  # seconds between looks
_LOOK_TIMEOUT = 5.0


@dataclass(frozen=True, slots=True)
class View:
    """The last answer, when it came (on the loop's clock), and what is wrong since."""

    status: admin_pb2.StatusReply | None = None
    at: float = 0.0
    error: str = ""


def add(commands: Commands, common: argparse.ArgumentParser) -> None:
    add_command(commands, common, "top", "watch nodes and instances live", run)


def run(args: argparse.Namespace) -> int:
    console = Console(highlight=False)
    if not (console.is_terminal and sys.stdin.isatty()):
        raise RoostError(Reason.BAD_REQUEST, "roost top needs a terminal", "use `roost status` in scripts")
    with _single_keys():
        asyncio.run(_watch(coordinators_of(args), console))
    return 0


async def _watch(addresses: tuple[str, ...], console: Console) -> None:
    loop = asyncio.get_running_loop()
    leave = asyncio.Event()

    def key() -> None:
        if os.read(sys.stdin.fileno(), 64) in (b"q", b"Q", b""):
            leave.set()

    loop.add_reader(sys.stdin.fileno(), key)
    coordinators = Coordinators(addresses)
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            view = View()
            looking = asyncio.create_task(look(coordinators, view))
            while not leave.is_set():
                if looking.done():
                    view = looking.result()
                    looking = asyncio.create_task(look(coordinators, view))
                live.update(render(view, loop.time()), refresh=True)
                await _wait(leave, _PERIOD if view.status or view.error else 0.05)
            looking.cancel()
    finally:
        loop.remove_reader(sys.stdin.fileno())
        await coordinators.close()


async def look(coordinators: Coordinators, before: View) -> View:
    """What the coordinators say now; if none answers, what was known before and why it is old."""
    try:
        status = await coordinators.ask(fetch, _LOOK_TIMEOUT)
    except RoostError as error:
        return replace(before, error=error.message)
    return View(status, asyncio.get_running_loop().time())


def render(view: View, now: float) -> RenderableType:
    title = Text("roost top", "bold")
    if view.status is None:
        body: RenderableType = Text("asking the coordinators…", "dim")
    else:
        body = _tables.together(_tables.nodes(view.status), _tables.instances(view.status))
        title.append(f"  coordinator {printable(view.status.coordinator)}", "dim")
    title.append("  q leaves", "dim")
    lines: list[RenderableType] = [title]
    if view.error:
        age = f"; this is {now - view.at:.0f} s old" if view.status is not None else ""
        lines.append(Text(printable(view.error) + age, "red"))
    return Group(*lines, Text(), body)


async def _wait(event: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        pass


@contextmanager
def _single_keys() -> Iterator[None]:
    """The terminal gives each key at once and shows none; as it was before, afterwards."""
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    tty.setcbreak(fd)
    try:
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
