"""`python -m edge_agent` with another daemon: `python -m tests.support.run_jailer edge.toml PROGRAM ...`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from edge_agent.config import EdgeConfig
from edge_agent.jail import app
from edge_agent.jail.config import jailer_config
from edge_agent.jail.protocol import Refused
from shared import config, log

LEVEL = "ROOST_TEST_LOG_LEVEL"


def main() -> None:
    file = Path(sys.argv[1])
    log.setup("test jailer", os.environ.get(LEVEL, "INFO"))
    edge = config.load_file(EdgeConfig, file)
    try:
        app.run(jailer_config(edge, file), tuple(sys.argv[2:]))
    except Refused as refused:
        sys.exit(f"{refused.message} ({refused.hint})")


if __name__ == "__main__":
    main()
