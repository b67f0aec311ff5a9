"""An agent at a terminal, without a node: to try it while it is written."""

from __future__ import annotations

import binascii
import fnmatch
import getpass
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from roost._line import Message
from roost.agent import Answerer, Turn

_TASK_SECONDS = 30.0  # as the default of tasks.timeout
_NO_TIMERS = "No node here: timers are not kept.\n"
_NO_WALLS = "No node here: a task runs without walls or limits, as you, and can do all that you can.\n"


def chat(handler: Callable[[Turn], Any], state_dir: Path) -> None:
    state_dir.mkdir(exist_ok=True)
    prompt = "> " if sys.stdin.isatty() else ""
    if prompt:
        print(f"No node here: talking at this terminal, with the state in {state_dir}/. Ctrl-D ends it.")
    streamed: list[str] = []

    def emit(message: Message) -> None:
        if message["kind"] == "done":  # of a safe call; nobody keeps a journal here
            return
        if message["kind"] == "timer":
            sys.stderr.write(_NO_TIMERS)
            return
        if message["kind"] == "delta":
            streamed.append(message["text"])
            print(message["text"], end="", flush=True)
            return
        text = message["text"] if message["kind"] == "reply" else message["message"]
        if streamed:
            print()
        if text != "".join(streamed):
            print(text, flush=True)
        streamed.clear()

    answerer = Answerer(handler, state_dir, emit, answer_here)
    user = _user_name()
    while True:
        try:
            message = input(prompt)
            if message:
                answerer.answer({"id": uuid.uuid4().hex, "user": user, "message": message})
        except (EOFError, KeyboardInterrupt):
            return


def _user_name() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a uid without a name
        return "you"


def answer_here(asked: Message) -> Message:
    """What a node answers, without a journal: a turn is run once here."""
    if asked["kind"] == "call":
        return {"key": hashlib.sha256(f"{asked['id']} {asked['call']}".encode()).hexdigest()[:32]}
    if asked["kind"] == "done":
        return {name: asked[name] for name in ("result", "failed") if name in asked}
    return run_here(asked)


def run_here(asked: Message) -> Message:
    """What a node answers to "run", of a command that only has a directory and a time limit of its own."""
    sys.stderr.write(_NO_WALLS)
    with tempfile.TemporaryDirectory(prefix="roost-task-") as name:
        directory = Path(name)
        for path, data in asked["files"].items():
            (directory / path).parent.mkdir(parents=True, exist_ok=True)
            (directory / path).write_bytes(binascii.a2b_base64(data))
        try:
            process = subprocess.Popen(
                asked["argv"],
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            told = f"{asked['argv'][0]} can't be run: {error}"
            return {"error": {"reason": "JAIL_FAILED", "message": told, "hint": "is it installed here?"}}
        timed_out = False
        try:
            output, errors = process.communicate(timeout=asked.get("timeout", _TASK_SECONDS))
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        if timed_out:
            output, errors = process.communicate()
        return {
            "code": process.returncode,
            "stdout": _base64(output),
            "stderr": _base64(errors),
            "truncated": False,
            "files": {} if timed_out else _taken(directory, asked["outputs"]),
            "omitted": [],
            "timed_out": timed_out,
            "out_of_memory": False,
        }


def _taken(directory: Path, patterns: list[str]) -> dict[str, str]:
    paths = ((p, p.relative_to(directory).as_posix()) for p in sorted(directory.rglob("*")))
    return {
        name: _base64(path.read_bytes())
        for path, name in paths
        if path.is_file()
        and not path.is_symlink()
        and any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    }


def _base64(data: bytes) -> str:
    return binascii.b2a_base64(data, newline=False).decode()
