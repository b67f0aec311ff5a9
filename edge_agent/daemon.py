"""The node's unprivileged daemon, which the jailer starts: gRPC, mDNS, state, and the link."""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
from pathlib import Path

from edge_agent import app
from edge_agent.config import EdgeConfig
from shared import config, failpoints, log

JAILER_FD = "ROOST_JAILER_FD"


def main() -> None:
    parser = argparse.ArgumentParser(description="A node's daemon. Started by the jailer: run `roost-edge`.")
    parser.add_argument("--config", type=Path, required=True, help="the node's edge.toml")
    args = parser.parse_args()
    edge = config.load_file(EdgeConfig, args.config)
    log.setup(edge.node)
    failpoints.enable(os.environ)
    jailer = socket.socket(fileno=int(os.environ.pop(JAILER_FD)))
    asyncio.run(app.run(edge, jailer))


if __name__ == "__main__":
    main()
