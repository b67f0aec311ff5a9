"""`make demo`: the main job once, on real parts, told as it goes. Ends by itself: 0 if all of it held."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from roost import Client
from roost.client import Reply
from roost.up import record
from shared.errors import RoostError

EXAMPLES = Path(__file__).parent
USERS = {
    "ana": ("Oslo", (59.91, 10.75)),
    "ben": ("Barcelona", (41.39, 2.17)),
    "cy": ("Madrid", (40.42, -3.70)),
}

console = Console(highlight=False, width=min(Console().width, 118))


class Broken(Exception):
    """The demo did not show what it should have."""


def main() -> int:
    begun = time.monotonic()
    try:
        with mesh() as data:
            show(data)
    except (Broken, RoostError, subprocess.CalledProcessError) as error:
        console.print(f"[red]The demo failed:[/red] {error}")
        if isinstance(error, RoostError) and error.hint:
            console.print(f"hint: {error.hint}")
        return 1
    console.print(f"\n[bold green]All of it held[/bold green], in {time.monotonic() - begun:.0f} s.")
    return 0


def show(data: Path) -> None:
    title("A developer deploys an agent")
    roost("deploy", str(EXAMPLES / "chef"))
    roost("deploy", str(EXAMPLES / "peek"))

    title("Three users talk to it; each gets an instance of their own, near them")
    first = say("ana", "I'm vegetarian, and I have 6 eggs and 500 g rice")
    say("ben", "I don't like mushrooms, and I have 2 tomatoes")
    say("cy", "What do you know about me?")
    roost("status")

    title("One instance can't see another's files")
    home = data / "nodes" / first.receipt.node / "jails"
    console.print(f"[dim]On the host, {home} holds: {', '.join(sorted(os.listdir(home)))}[/dim]")
    saw = say("ana", str(home), agent="peek")
    expect("No such file or directory" in saw.text, "a jail sees the host's files")

    title(f"kill -9 {first.receipt.node}: its user goes on elsewhere, with the same pantry")
    kill(data, first.receipt.node)
    second = say("ana", "What do you know about me?")
    expect("egg" in second.text and "vegetarian" in second.text, "Ana's pantry was lost")
    expect(second.receipt.epoch == first.receipt.epoch + 1, "the epoch did not grow by one")
    expect(second.receipt.node != first.receipt.node, "Ana is where she was")

    title(f"kill -9 {second.receipt.node}, the other edge: the cloud takes over")
    kill(data, second.receipt.node)
    third = say("ana", "I ate 2 eggs")
    fourth = say("ben", "What do you know about me?")
    expect(third.receipt.node == fourth.receipt.node == "cloud-1", "the cloud did not take over")
    expect("tomato" in fourth.text, "Ben's pantry was lost")
    roost("status")


# --- scenes ----------------------------------------------------------------------------------


@contextmanager
def mesh() -> Iterator[Path]:
    """A mesh of real processes in a directory of its own; nothing is left of it."""
    title("A private etcd, a coordinator, two edges and a cloud node start on this machine")
    data = Path(tempfile.mkdtemp(prefix="roost-demo-"))
    try:
        roost("up", "--detach", "--data", str(data))
        running = record.read(data)
        if running is None:
            raise Broken("`roost up` left no record")
        os.environ["ROOST_COORDINATORS"] = ",".join(running.coordinators)
        yield data
    finally:
        roost("down", "--data", str(data))
        shutil.rmtree(data, ignore_errors=True)


def say(user: str, message: str, agent: str = "chef") -> Reply:
    city, position = USERS[user]
    console.print(f"\n[bold]{user}[/bold] [dim](in {city}, to {agent})[/dim]: {message}")
    with Client(position=position) as client, client.attach(agent, user) as chat:
        begun = time.monotonic()
        reply = chat.send(message)
        took = time.monotonic() - begun
    console.print(reply.text.strip(), style="cyan", markup=False)
    r = reply.receipt
    lost = ", ".join(r.lost) or "nothing"
    console.print(
        f"[dim]  {r.node}, epoch {r.epoch}, state version {r.version}, resumed from {r.resumed_from}, "
        f"lost: {lost}; {took * 1000:.0f} ms[/dim]"
    )
    console.print(f"  why there: {reply.why}", style="dim", markup=False)
    return reply


def kill(data: Path, node: str) -> None:
    """As if the box had lost power: its jailer dies at once, and with it all else of the node."""
    running = record.read(data)
    process = next((p for p in running.processes if p.name == node), None) if running else None
    if process is None:
        raise Broken(f"there is no node {node} to kill")
    os.kill(process.pid, signal.SIGKILL)
    console.print(f"[red]kill -9 {process.pid}[/red]")


def roost(*arguments: str) -> None:
    console.print(f"[dim]$ roost {' '.join(arguments)}[/dim]")
    subprocess.run([sys.executable, "-m", "roost.cli.main", *arguments], check=True, timeout=120)


def title(text: str) -> None:
    console.print(f"\n[bold yellow]== {text}[/bold yellow]")


def expect(held: bool, otherwise: str) -> None:
    if not held:
        raise Broken(otherwise)


if __name__ == "__main__":
    sys.exit(main())
