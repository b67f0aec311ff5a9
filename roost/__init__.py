"""What developers import: `from roost import Agent` in an agent, `from roost import Client` elsewhere.

This file, `agent.py`, `_effects.py` and `_timers.py` alone are bound into jails, so they need nothing but the
standard library and Python 3.9; the client, which needs gRPC, is imported when somebody asks for it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from roost._effects import CallError
    from roost._tasks import TaskError, TaskResult
    from roost.agent import Agent, Turn
    from roost.client import AsyncClient, Client

__all__ = ["Agent", "AsyncClient", "CallError", "Client", "TaskError", "TaskResult", "Turn"]

_HOMES = {
    "Agent": "roost.agent",
    "CallError": "roost._effects",
    "TaskError": "roost._tasks",
    "TaskResult": "roost._tasks",
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
