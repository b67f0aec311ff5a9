"""`roost up`: a whole mesh on this machine, until Ctrl-C or `roost down`."""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.text import Text

from roost._where import COORDINATORS_VARIABLE, data_dir
from roost.cli._common import Commands, add_command
from roost.up import needs, record
from roost.up.layout import PORTS, layout
from roost.up.probe import MeshProbe
from roost.up.processes import started_at, tail, wait_until
from roost.up.record import Record
from roost.up.running import LOCK, clear_strays, only_one, running
from roost.up.supervisor import Supervisor
from shared.errors import Reason, RoostError

_DETACH_TIMEOUT = 120.0  # seconds for all to serve: the supervisor's own deadlines are shorter


def add(commands: Commands, common: argparse.ArgumentParser) -> None:
    parser = add_command(commands, common, "up", "run a whole mesh on this machine", run)
    parser.add_argument(
        "--detach", action="store_true", help="return when it is ready; `roost down` stops it"
    )
    add_data(parser)


def add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, metavar="DIR", help=f"where its data is (default: {data_dir()})")


def data_of(args: argparse.Namespace) -> Path:
    return Path(os.path.abspath(args.data or data_dir()))


def run(args: argparse.Namespace) -> int:
    data = data_of(args)
    etcd = needs.check(needs.look())
    data.mkdir(parents=True, exist_ok=True, mode=0o700)  # users' state will be in it
    if args.detach:
        with only_one(LOCK):
            pass  # told here, where somebody reads it; the one in the background asks again
        return _detach(data)
    with only_one(LOCK):
        stale = record.read(data)
        if stale is not None:
            clear_strays(stale)
            record.remove(data)
        return asyncio.run(_serve(data, etcd))


async def _serve(data: Path, etcd: str) -> int:
    processes = layout(data, _free_ports(PORTS), sys.executable, etcd, platform.machine())
    coordinator = next(p.address for p in processes if p.name == "coordinator")
    probe = MeshProbe(coordinator)
    supervisor = Supervisor(processes, probe.serves, _report)
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    try:
        if await _start(supervisor, stop):
            pid = os.getpid()
            ours = Record(pid, started_at(pid) or 0, (coordinator,), supervisor.records())
            record.write(data, ours)
            _summary(data, ours)
            await stop.wait()
            print("Stopping…", flush=True)
    finally:
        await supervisor.stop()
        await probe.close()
        record.remove(data)
    return 0


async def _start(supervisor: Supervisor, stop: asyncio.Event) -> bool:
    """True when all serve; False if it was told to stop before."""
    starting = asyncio.create_task(supervisor.start(), name="start")
    stopping = asyncio.create_task(stop.wait(), name="stop")
    try:
        await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            await starting
        return starting.done()
    finally:
        starting.cancel()
        stopping.cancel()
        await asyncio.wait((starting, stopping))


def _report(line: str) -> None:
    print(f"roost: {line}", file=sys.stderr, flush=True)


def _free_ports(count: int) -> Sequence[int]:
    """Loopback ports that are free now; held together, so that they differ."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _detach(data: Path) -> int:
    """Runs `roost up` in a session of its own, and returns when it is ready."""
    log = data / "logs" / "up.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        child = subprocess.Popen(
            [sys.executable, "-m", "roost.cli.main", "up", "--data", str(data)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd="/",
            start_new_session=True,
        )
    ready: Record | None = None

    def settled() -> bool:
        nonlocal ready
        found = running(data)
        ready = found if found is not None and found.pid == child.pid else None
        return ready is not None or child.poll() is not None

    try:
        in_time = wait_until(settled, _DETACH_TIMEOUT)
    except KeyboardInterrupt:
        child.terminate()
        child.wait()
        raise
    if ready is not None:
        _summary(data, ready)
        return 0
    if not in_time:
        child.terminate()
    said = [line.removeprefix("roost: ") for line in tail(log, 30)]
    raise RoostError(Reason.INTERNAL, "the mesh did not start", "\n".join(said) or f"see {log}")


def _summary(data: Path, running: Record) -> None:
    console = Console(highlight=False)
    console.print(Text("Roost is up.", "bold green"))
    for process in running.processes:
        console.print(f"  {process.name:<12} [dim]{process.address}, process {process.pid}[/dim]")
    if data != data_dir() or "SUDO_USER" in os.environ:  # then clients look elsewhere
        addresses = ",".join(running.coordinators)
        console.print(f"Clients find it with: export {COORDINATORS_VARIABLE}={addresses}")
    console.print("Next: [bold]roost deploy examples/hello && roost chat hello --user ana[/bold]")
    console.print("[dim]roost top watches it; Ctrl-C here or `roost down` stops it.[/dim]")
    sys.stdout.flush()
