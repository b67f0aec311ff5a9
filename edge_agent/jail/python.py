"""How an agent is started in a jail."""

from __future__ import annotations

import os
import sys

from shared.policy import RunSection

PARKS_VARIABLE = "ROOST_PARKS"  # of a zygote whose forks wait for users; as roost.zygote has it

_PATH = ["/roost", "/agent", "/packages"]  # before the system's, which may be older
_MAIN = "import sys; sys.path[:0] = {path}; from roost.agent import main; main({entry!r})"
_ZYGOTE = "import sys; sys.path[:0] = {path}; from roost.zygote import main_zygote; main_zygote({entry!r})"


def python_argv(entry: str) -> tuple[str, ...]:
    """Runs `entry`, "module:object" of the agent's version, with this node's interpreter: the base one (a
    virtual environment is not in the jail), isolated from environment variables and writing no bytecode."""
    return (base_interpreter(), "-I", "-B", "-c", _MAIN.format(path=_PATH, entry=entry))


def zygote_argv(entry: str) -> tuple[str, ...]:
    """Imports `entry` and forks on demand."""
    return (base_interpreter(), "-I", "-B", "-c", _ZYGOTE.format(path=_PATH, entry=entry))


def agent_argv(run: RunSection) -> tuple[str, ...]:
    """As `run` says. A command's program is looked for along PATH, inside; `python` is the node's, which the
    packages of a bundle were prepared for."""
    if run.entry:
        return python_argv(run.entry)
    program, *arguments = run.command
    if program in ("python", "python3"):
        return (base_interpreter(), *arguments)
    return ("/usr/bin/env", "--", program, *arguments)


def agent_environment(run: RunSection, packages: str) -> dict[str, str]:
    return {"PYTHONPATH": "/packages"} if packages and run.command else {}


def base_interpreter() -> str:
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    inside = os.path.join(sys.base_prefix, "bin", name)
    return inside if os.path.exists(inside) else os.path.realpath(sys.executable)
