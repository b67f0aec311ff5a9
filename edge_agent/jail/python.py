"""How an agent that is a Python program is started in a jail."""

from __future__ import annotations

import os
import sys

_MAIN = 'import sys; sys.path[:0] = ["/roost", "/agent"]; from roost.agent import main; main({entry!r})'
_ZYGOTE = (
    'import sys; sys.path[:0] = ["/roost", "/agent"]; from roost.zygote import main_zygote; '
    "main_zygote({entry!r})"
)


def python_argv(entry: str) -> tuple[str, ...]:
    """Runs `entry`, "module:object" of the agent's version, with this node's interpreter: the base one (a
    virtual environment is not in the jail), isolated from environment variables and writing no bytecode."""
    return (base_interpreter(), "-I", "-B", "-c", _MAIN.format(entry=entry))


def zygote_argv(entry: str) -> tuple[str, ...]:
    """Imports `entry` and forks on demand."""
    return (base_interpreter(), "-I", "-B", "-c", _ZYGOTE.format(entry=entry))


def base_interpreter() -> str:
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    inside = os.path.join(sys.base_prefix, "bin", name)
    return inside if os.path.exists(inside) else os.path.realpath(sys.executable)
