"""`python -m edge_agent` with another daemon: `python -m tests.support.run_jailer edge.toml PROGRAM ...`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from edge_agent.config import EdgeConfig
from edge_agent.jail import app, spawn_shell
from edge_agent.jail.config import jailer_config
from edge_agent.jail.protocol import Refused
from shared import config, log

LEVEL = "ROOST_TEST_LOG_LEVEL"
BROKEN = "ROOST_TEST_BROKEN_STEP"  # what an init is to fail at, a step of spawn_shell.SETTLED


def main() -> None:
    file = Path(sys.argv[1])
    log.setup("test jailer", os.environ.get(LEVEL, "INFO"))
    if broken := os.environ.get(BROKEN):
        spawn_shell.SETTLED = tuple(map(_broken, spawn_shell.SETTLED))
        assert any(what == broken for what, _ in spawn_shell.SETTLED)
    edge = config.load_file(EdgeConfig, file)
    try:
        app.run(jailer_config(edge, file), tuple(sys.argv[2:]))
    except Refused as refused:
        sys.exit(f"{refused.message} ({refused.hint})")


def _broken(step: tuple[str, Any]) -> tuple[str, Any]:
    """One of that name closes what is not open."""
    what, act = step
    return what, (lambda settled: os.close(-1)) if what == os.environ[BROKEN] else act


if __name__ == "__main__":
    main()
