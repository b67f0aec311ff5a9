"""What an agent asks of a task, and what it hears of it: "run" and "result" of docs/agent-protocol.md.

Always true: what `parse_run` returns is within the agent's policy, and what `result` makes of a task that
wrote as much as it may fits into one message. Neither the agent nor the task is trusted.
"""

from __future__ import annotations

import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from edge_agent.jail.python import base_interpreter
from shared.errors import Reason, RoostError
from shared.policy import TasksSection
from shared.resources import Resources
from shared.units import format_size, parse_size

MAX_FILES_BYTES = 4 << 20  # of all files that go in, and of all that come out
MAX_FILES = 256
MAX_STREAM_BYTES = 512 << 10  # of its standard output, and of its standard error
MAX_PATH = 255  # bytes
_MAX_ARGS, _MAX_ARGS_BYTES = 256, 60 << 10
_MAX_PATTERNS = 16
_LEAST_MEMORY = 16 << 20
_HINT = "docs/tasks.md says what a task may be asked"


@dataclass(frozen=True, slots=True)
class Run:
    """One command that an agent wants run. `task` is the agent's name for it."""

    task: str
    argv: tuple[str, ...]
    files: Mapping[str, bytes]
    need: Resources
    timeout: float
    outputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Finished:
    """How a task ended. `code`: exit code, or -signal. `truncated`: not all of its output is here. `omitted`:
    files that were asked for and are too many or too large."""

    code: int
    output: bytes = b""
    errors: bytes = b""
    truncated: bool = False
    files: Mapping[str, bytes] = field(default_factory=dict)
    omitted: tuple[str, ...] = ()
    timed_out: bool = False
    out_of_memory: bool = False


def name_of(message: Mapping[str, Any]) -> str:
    """What the agent calls the task, without which it could not be answered. BAD_REQUEST."""
    name = message.get("task")
    if not isinstance(name, str) or not 1 <= len(name) <= 64:
        raise _bad("'task' must be a text of 1 to 64 characters")
    return name


def parse_run(message: Mapping[str, Any], policy: TasksSection) -> Run:
    """BAD_REQUEST says what is wrong with it."""
    if policy.at_once == 0:
        raise RoostError(
            Reason.BAD_REQUEST, "this agent may run no tasks", "set tasks.at_once in agent.toml to allow them"
        )
    outputs = _texts(message, "outputs", _MAX_PATTERNS)
    if any(len(pattern) > MAX_PATH for pattern in outputs):
        raise _bad(f"'outputs' must hold patterns of at most {MAX_PATH} characters")
    return Run(
        name_of(message),
        _argv(message),
        _files(message),
        Resources(
            _memory(message, policy),
            round(_number(message, "cpu", 0.01, policy.cpu) * 1000),
            int(_number(message, "pids", 1, policy.pids)),
        ),
        _number(message, "timeout", 0.001, policy.timeout),
        outputs,
    )


def result(turn_id: str, task: str, finished: Finished) -> bytes:
    return _encode(
        turn_id,
        task,
        code=finished.code,
        stdout=_base64(finished.output),
        stderr=_base64(finished.errors),
        truncated=finished.truncated,
        files={path: _base64(data) for path, data in finished.files.items()},
        omitted=list(finished.omitted),
        timed_out=finished.timed_out,
        out_of_memory=finished.out_of_memory,
    )


def refusal(turn_id: str, task: str, error: RoostError) -> bytes:
    """It did not run, or nothing is known of how it ended."""
    told = {"reason": error.reason.value, "message": error.message[:2000], "hint": error.hint[:2000]}
    return _encode(turn_id, task, error=told)


def _encode(turn_id: str, task: str, **fields: Any) -> bytes:
    return json.dumps({"kind": "result", "id": turn_id, "task": task, **fields}).encode()


def _base64(data: bytes) -> str:
    return binascii.b2a_base64(data, newline=False).decode()


def _bad(what: str) -> RoostError:
    return RoostError(Reason.BAD_REQUEST, f"a task can't be run: {what}", _HINT)


def _texts(message: Mapping[str, Any], name: str, most: int) -> tuple[str, ...]:
    values = message.get(name, [])
    if (
        not isinstance(values, list)
        or len(values) > most
        or not all(isinstance(v, str) and _is_text(v) for v in values)
    ):
        raise _bad(f"{name!r} must be a list of at most {most} texts without NUL")
    return tuple(values)


def _is_text(value: str) -> bool:
    try:
        return b"\0" not in value.encode()
    except UnicodeEncodeError:
        return False


def _argv(message: Mapping[str, Any]) -> tuple[str, ...]:
    argv = _texts(message, "argv", _MAX_ARGS)
    if not argv or not argv[0]:
        raise _bad("'argv' must begin with a program")
    if sum(len(arg.encode()) for arg in argv) > _MAX_ARGS_BYTES:
        raise _bad(f"'argv' is over {_MAX_ARGS_BYTES >> 10} KiB: give what is long as a file")
    # The interpreter that runs agents, which need not be where programs are looked for.
    return (base_interpreter(), *argv[1:]) if argv[0] in ("python3", "python") else argv


def _files(message: Mapping[str, Any]) -> dict[str, bytes]:
    given = message.get("files", {})
    if not isinstance(given, dict) or len(given) > MAX_FILES:
        raise _bad(f"'files' must be an object of at most {MAX_FILES} paths")
    files: dict[str, bytes] = {}
    for path, text in given.items():
        _check_path(path)
        for parent in PurePosixPath(path).parents:
            if str(parent) in given:
                raise _bad(f"{str(parent)!r} is both a file and a directory")
        try:
            files[path] = binascii.a2b_base64(text, strict_mode=True)
        except (TypeError, ValueError):
            raise _bad(f"the content of file {path!r} must be text in base64") from None
    if sum(map(len, files.values())) > MAX_FILES_BYTES:
        raise _bad(f"its files are over {MAX_FILES_BYTES >> 20} MiB in all")
    return files


def _check_path(path: str) -> None:
    parts = path.split("/")
    if not _is_text(path) or len(path.encode()) > MAX_PATH or any(p in ("", ".", "..") for p in parts):
        raise _bad(f"{path[:80]!r} is no path of a file beneath its working directory")


def _memory(message: Mapping[str, Any], policy: TasksSection) -> int:
    value = message.get("memory")
    if isinstance(value, str):
        try:
            value = parse_size(value)
        except ValueError as error:
            raise _bad(f"'memory': {error}") from error
    return int(_number({"memory": value}, "memory", _LEAST_MEMORY, policy.memory))


def _number(message: Mapping[str, Any], name: str, least: float, most: float) -> float:
    """`most`, which the policy sets, if the agent says nothing."""
    value = message.get(name)
    if value is None:
        return most
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value:
        raise _bad(f"{name!r} must be a number of at least {least:g}")
    if value > most:
        shown = [format_size(int(n)) if name == "memory" else f"{n:g}" for n in (most, value)]
        raise RoostError(
            Reason.BAD_REQUEST,
            f"a task of this agent may have at most {shown[0]} as its {name!r}, not {shown[1]}",
            f"ask for less, or raise tasks.{name} in agent.toml",
        )
    return value
