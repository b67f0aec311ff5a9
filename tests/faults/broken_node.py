"""A node whose daemon has a mistake: `python -m tests.faults.broken_node --variant NAME --config FILE`."""

from __future__ import annotations

import sys
from pathlib import Path

from edge_agent.config import EdgeConfig
from edge_agent.jail import app
from edge_agent.jail.config import jailer_config
from shared import config, log


def main(variant: str, file: Path) -> None:
    edge = config.load_file(EdgeConfig, file)
    log.setup(f"{edge.node} jailer")
    daemon = (sys.executable, "-m", "tests.faults.broken_daemon", "--variant", variant, "--config", str(file))
    app.run(jailer_config(edge, file), daemon)


if __name__ == "__main__":
    main(sys.argv[2], Path(sys.argv[4]).resolve())
