"""Egress proxies for tests."""

from __future__ import annotations

from pathlib import Path

from edge_agent.egress.credentials import Credentials
from edge_agent.egress.outside import Outside
from edge_agent.egress.proxy import Egress


def no_egress() -> Egress:
    """For agents that reach nothing."""
    return Egress(Outside((), None), Credentials(Path("/nonexistent"), ()))
