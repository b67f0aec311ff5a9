"""python -m coordinator --config FILE"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from coordinator.app import run
from coordinator.config import CoordinatorConfig
from shared import config, failpoints, log


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 after a stop, 1 if it could not start, 2 for a bad configuration."""
    parser = argparse.ArgumentParser(prog="roost-coordinator", description="Roost's control plane.")
    parser.add_argument("--config", type=Path, required=True, help="coordinator.toml")
    parser.add_argument("--log-level", default="INFO", choices=["DEBUG", "INFO", "WARNING", "ERROR"])
    arguments = parser.parse_args(argv)
    try:
        settings = config.load_file(CoordinatorConfig, arguments.config)
    except config.ConfigError as error:
        print(f"roost-coordinator: {error}", file=sys.stderr)
        return 2
    log.setup(settings.id, arguments.log_level)
    failpoints.enable(os.environ)
    try:
        asyncio.run(run(settings))
    except config.ConfigError as error:
        print(f"roost-coordinator: {arguments.config}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"roost-coordinator: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
