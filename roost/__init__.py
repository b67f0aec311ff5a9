"""What developers import: `from roost import Agent` in an agent, `from roost import Client` elsewhere.

This file and `roost/agent.py` alone are bound into jails, so both need nothing but the standard library
and Python 3.9; the client, which needs gRPC, is imported when somebody asks for it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from roost.agent import Agent, Turn
    from roost.client import AsyncClient, Client

__all__ = ["Agent", "AsyncClient", "Client", "Turn"]

_HOMES = {
    "Agent": "roost.agent",
    "Turn": "roost.agent",
    "AsyncClient": "roost.client",
    "Client": "roost.client",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'roost' has no attribute {name!r}")
    try:
        module = importlib.import_module(_HOMES[name])
    except ModuleNotFoundError as error:
        raise AttributeError(
            f"roost.{name} can't be used here (inside a jail there is no client): {error}"
        ) from error
    return getattr(module, name)
