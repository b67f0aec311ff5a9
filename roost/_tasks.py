"""`Turn.run`: commands in jails of their own. Like agent.py it is bound into jails: standard library alone,
Python 3.9."""

from __future__ import annotations

import binascii
import concurrent.futures
import functools
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

MAX_TASKS = 32  # at once, as the node has it
MAX_TASK_FILES = 4 << 20  # bytes of all files that go into a task, as the node has it

Message = dict[str, Any]


class TaskResult(NamedTuple):
    """How a command that `Turn.run` ran has ended."""

    code: int  # its exit code, or -signal
    stdout: str
    stderr: str
    files: dict[str, bytes]  # those that `outputs` asked for
    timed_out: bool  # it was killed for that, and left no files
    out_of_memory: bool  # at least one of its processes was killed for that
    truncated: bool  # stdout or stderr was too long: only its beginning is here
    omitted: list[str]  # files that `outputs` asked for, and that were too large or too many

    @property
    def ok(self) -> bool:
        return self.code == 0 and not self.timed_out


class TaskError(Exception):
    """A task could not be run, or the node ended it. `reason` is for programs: NO_ROOM, BAD_REQUEST, ..."""

    def __init__(self, reason: str, message: str, hint: str) -> None:
        super().__init__(f"{message} ({hint})" if hint else message)
        self.reason = reason


def request(
    turn_id: str, argv: Sequence[str], files: Mapping[str, bytes | str], outputs: Sequence[str]
) -> Message:
    if isinstance(argv, str) or not all(isinstance(arg, str) for arg in argv):
        raise TypeError("run() wants a list of str: the program and its arguments")
    contents = {path: _as_bytes(data) for path, data in files.items()}
    if sum(map(len, contents.values())) > MAX_TASK_FILES:
        raise ValueError(f"the files of a task are over {MAX_TASK_FILES >> 20} MiB in all")
    return {
        "kind": "run",
        "id": turn_id,
        "task": uuid.uuid4().hex,
        "argv": list(argv),
        "files": {path: _base64(data) for path, data in contents.items()},
        "outputs": list(outputs),
    }


def result(answer: Message) -> TaskResult:
    """TaskError if the node could not run it."""
    if error := answer.get("error"):
        raise TaskError(error["reason"], error["message"], error["hint"])
    return _task_result(answer)


@functools.cache
def threads() -> concurrent.futures.ThreadPoolExecutor:
    """One for each task that may run at once; asyncio's own have room for fewer."""
    return concurrent.futures.ThreadPoolExecutor(MAX_TASKS, "roost-task")


def _base64(data: bytes) -> str:
    return binascii.b2a_base64(data, newline=False).decode()


def _as_bytes(data: bytes | str) -> bytes:
    return data.encode() if isinstance(data, str) else bytes(data)


def _task_result(answer: Message) -> TaskResult:
    return TaskResult(
        answer["code"],
        binascii.a2b_base64(answer["stdout"]).decode(errors="replace"),
        binascii.a2b_base64(answer["stderr"]).decode(errors="replace"),
        {path: binascii.a2b_base64(data) for path, data in answer["files"].items()},
        answer["timed_out"],
        answer["out_of_memory"],
        answer["truncated"],
        answer["omitted"],
    )
