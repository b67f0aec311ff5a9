"""Logs: one line an event on standard error, which a service manager keeps."""

from __future__ import annotations

import logging
import sys


def setup(who: str, level: str = "INFO") -> None:
    """Call once, in a daemon's main. `who` is the daemon's id."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s {who} %(name)s: %(message)s"))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.getLogger("grpc").setLevel("WARNING")
    logging.getLogger("etcd3aio").setLevel("ERROR")  # says every second that etcd is down; we say it once
