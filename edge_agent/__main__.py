"""The node. This process becomes the jailer, which starts the daemon (`edge_agent.daemon`)."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from edge_agent.config import EdgeConfig
from edge_agent.jail import app
from edge_agent.jail.config import jailer_config
from edge_agent.jail.protocol import Refused
from shared import config, log


def main() -> None:
    parser = argparse.ArgumentParser(prog="roost-edge", description="A node: runs agents in jails.")
    parser.add_argument("--config", type=Path, required=True, help="the node's edge.toml")
    parser.add_argument(
        "--clean", action="store_true", help="remove what a killed node left (control groups), and exit"
    )
    args = parser.parse_args()
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


if __name__ == "__main__":
    main()
