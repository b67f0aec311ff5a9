"""The `roost` command: parses, runs one subcommand, and turns errors into a message, a hint and an exit code.

Exit codes: 0 done; 1 an error, told on standard error (and as JSON on standard output under --json); 2 wrong
usage; 130 interrupted; 141 nobody reads the output any more.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from importlib import metadata

from roost.cli import (
    chat,
    deploy,
    down,
    drain,
    effects,
    jail,
    logs,
    move,
    nodes,
    quota,
    resize,
    state,
    status,
    top,
    up,
)
from roost.cli._common import tell
from shared.errors import RoostError

_COMMANDS = (
    up,
    down,
    deploy,
    chat,
    status,
    top,
    nodes,
    drain,
    move,
    resize,
    effects,
    quota,
    state,
    logs,
    jail,
)


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except RoostError as error:
        return _tell(error, as_json=getattr(args, "json", False))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read our output has left: also keep the interpreter from flushing into it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _tell(error: RoostError, as_json: bool) -> int:
    if as_json:
        told = {"reason": error.reason.value, "message": error.message, "hint": error.hint}
        print(json.dumps({"error": told}), flush=True)
    tell(error)
    return 1


def _parser() -> argparse.ArgumentParser:
    # These may stand before or after the subcommand, so neither parser may overwrite them with a default.
    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument(
        "--coordinator",
        action="append",
        metavar="HOST:PORT",
        help="a coordinator; may be repeated (else: ROOST_COORDINATORS, or the mesh of `roost up`)",
    )
    common.add_argument("--tenant", help="who owns the agents and users (default: default)")
    parser = argparse.ArgumentParser(
        prog="roost",
        description="One AI agent per user, roosting on the nearest box that has room.",
        parents=[common],
    )
    parser.add_argument("--version", action="version", version=f"roost {metadata.version('roost')}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add(commands, common)
    return parser


if __name__ == "__main__":
    sys.exit(main())
