"""`roost logs [NODE]`: what the parts of this machine's mesh wrote."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

from roost.cli._common import Commands, add_command, for_stdout
from roost.cli.up import add_data, data_of
from roost.up.processes import tail
from shared.errors import Reason, RoostError

_POLL = 0.3


def add(commands: Commands, common: argparse.ArgumentParser) -> None:
    parser = add_command(commands, common, "logs", "show what the mesh of `roost up` wrote", run)
    parser.add_argument(
        "node", metavar="NODE", nargs="?", help="a node, `coordinator` or `etcd` (default: all)"
    )
    parser.add_argument("-n", "--lines", type=int, default=50, help="how many of each (default: 50)")
    parser.add_argument("-f", "--follow", action="store_true", help="go on as more is written")
    add_data(parser)


def run(args: argparse.Namespace) -> int:
    logs = _find(data_of(args), args.node)
    for log in logs:
        for line in tail(log, args.lines):
            _show(log, line, len(logs) > 1)
    if args.follow:
        for log, line in _follow(logs):
            _show(log, line, len(logs) > 1)
    return 0


def _find(data: Path, name: str | None) -> list[Path]:
    there = sorted((data / "logs").glob("*.log"))
    if not there:
        raise RoostError(
            Reason.BAD_REQUEST,
            f"no logs in {data / 'logs'}: `roost up` has not run here",
            "for a mesh that runs as services: journalctl -u roost-edge -u roost-coordinator, on its machine",
        )
    if name is None:
        return there
    wanted = [log for log in there if log.stem == name]
    if not wanted:
        names = ", ".join(log.stem for log in there)
        raise RoostError(Reason.NODE_UNKNOWN, f"there is no log of {name!r} here", f"there are: {names}")
    return wanted


def _show(log: Path, line: str, name_it: bool) -> None:
    print((f"{log.stem:<12} " if name_it else "") + for_stdout(line), flush=True)


def _follow(logs: list[Path]) -> Iterator[tuple[Path, str]]:
    """Lines that are written from now on. A file that begins anew, as after a restart, is read from there."""
    sizes = {log: log.stat().st_size for log in logs}
    while True:
        for log in logs:
            size = log.stat().st_size if log.exists() else 0
            if size < sizes[log]:
                sizes[log] = 0
            if size > sizes[log]:
                with log.open("rb") as file:
                    file.seek(sizes[log])
                    written = file.read(size - sizes[log])
                whole = written[: written.rfind(b"\n") + 1]
                sizes[log] += len(whole)
                for line in whole.decode(errors="replace").splitlines():
                    yield log, line
        time.sleep(_POLL)
