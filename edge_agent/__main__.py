"""The node. This process becomes the jailer, which starts the daemon (`edge_agent.daemon`)."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from edge_agent.config import EdgeConfig
from edge_agent.jail import app
from edge_agent.jail.config import jailer_config
from edge_agent.jail.protocol import Refused
from shared import config, log


def main() -> None:
    args = _parser().parse_args()
    if args.plan is not None:
        sys.exit(_plan(args))
    if args.config is None:
        sys.exit("roost-edge: --config is missing: the node's edge.toml")
    file: Path = args.config.resolve()
    try:
        edge = config.load_file(EdgeConfig, file)
        log.setup(f"{edge.node} jailer")
        if args.clean:
            app.clean(jailer_config(edge, file))
            return
        daemon_argv = (sys.executable, "-m", "edge_agent.daemon", "--config", str(file))
        app.run(jailer_config(edge, file), daemon_argv)
    except config.ConfigError as error:
        sys.exit(f"roost-edge: {error}")
    except Refused as refused:
        sys.exit(f"roost-edge: {refused.message}" + (f"\n  {refused.hint}" if refused.hint else ""))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="roost-edge", description="A node: runs agents in jails.")
    parser.add_argument("--config", type=Path, help="the node's edge.toml")
    parser.add_argument(
        "--clean", action="store_true", help="remove what a killed node left (control groups), and exit"
    )
    parser.add_argument(
        "--plan",
        metavar="AGENT",
        help="print, as JSON, all that is done to make a jail of this agent, and exit: what `roost jail "
        "plan` shows; a directory, an agent.toml, or - for one on standard input",
    )
    parser.add_argument("--way", choices=("exec", "zygote", "task"), default="exec", help="of --plan")
    parser.add_argument("--version", default="version", help="of --plan: the agent's, as its jails know it")
    parser.add_argument("--packages", action="store_true", help="of --plan: the agent brings packages")
    return parser


def _plan(args: argparse.Namespace) -> int:
    from edge_agent.planning import plan_of  # which needs more than a jailer may import
    from shared.errors import RoostError

    try:
        told = plan_of(args.plan, args.way, args.version, args.packages, args.config)
    except (RoostError, Refused) as error:
        told = {"error": {"message": error.message, "hint": error.hint}}
    except config.ConfigError as error:
        told = {"error": {"message": str(error), "hint": ""}}
    print(json.dumps(told))
    return 1 if "error" in told else 0


if __name__ == "__main__":
    main()
