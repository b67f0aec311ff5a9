"""A node whose daemon's wall clock a test can change: `python -m tests.faults.node_with_clock --config FILE`.

The offset is read from the file `clock` in the daemon's directory. All else is as with `edge_agent`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from edge_agent.config import EdgeConfig
from edge_agent.jail import app
from edge_agent.jail.config import jailer_config
from shared import config, log
from tests.faults.clock import faked_clock


def main(file: Path) -> None:
    edge = config.load_file(EdgeConfig, file)
    log.setup(f"{edge.node} jailer")
    clock = faked_clock(edge.data_dir / "daemon" / "clock")
    with_clock = ("/usr/bin/env", *(f"{name}={value}" for name, value in clock.items()))
    app.run(
        jailer_config(edge, file), (*with_clock, sys.executable, "-m", "edge_agent.daemon", *sys.argv[1:])
    )


if __name__ == "__main__":
    main(Path(sys.argv[2]).resolve())
