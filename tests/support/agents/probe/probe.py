"""An agent that does what tests tell it to: `COMMAND ARGUMENT` in each message."""

import functools
import hashlib
import json
import os
import pathlib
import signal
import sys
import threading
import time
import uuid

from roost import Agent

agent = Agent()
STATE = pathlib.Path("/state")
LEAKED = []
PEEKED = []


def _append(text):
    """Adds a line to a file, which a lost, doubled or half-done turn would show."""
    with (STATE / "lines").open("a") as f:
        f.write(text + "\n")
    return _lines("")


def _lines(_):
    path = STATE / "lines"
    return json.dumps(path.read_text().split() if path.exists() else [])


def _slow_append(text):
    seconds, _, line = text.partition(" ")
    with (STATE / "lines").open("a") as f:
        f.write(line + "\n")
        f.flush()
        time.sleep(float(seconds))
    return _lines("")


def _append_then_raise(text):
    _append(text)
    raise ValueError("told to fail")


def _append_then_exit(text):
    _append(text)
    os._exit(7)


def _eat(_):
    while True:
        LEAKED.append(bytearray(8 << 20))


def _exit_soon(_):
    signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    return "bye"


def _fill(text):
    name, _, megabytes = text.partition(" ")
    (STATE / name).write_bytes(os.urandom(int(megabytes) << 20))
    return "ok"


def _digest(name):
    with (STATE / name).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _peek(name):
    """In a thread, while the turn ends."""
    threading.Thread(target=lambda: PEEKED.append(_digest(name))).start()
    return "ok"


def _cut(text):
    """By the path, which opens nothing."""
    name, _, size = text.partition(" ")
    os.truncate(STATE / name, int(size))
    return "ok"


@functools.cache
def _process():
    """Which process this is. A pid counts in its own namespace, and is easily the same in the next jail; this
    is drawn at the first question, so that what is forked does not share it."""
    return uuid.uuid4().hex


COMMANDS = {
    "append": _append,
    "lines": _lines,
    "slow-append": _slow_append,
    "append-then-raise": _append_then_raise,
    "append-then-exit": _append_then_exit,
    "eat": _eat,
    "exit-soon": _exit_soon,
    "fill": _fill,
    "digest": _digest,
    "peek": _peek,
    "peeked": lambda _: json.dumps(PEEKED),
    "cut": _cut,
    "sleep": lambda text: time.sleep(float(text)) or "slept",
    "echo": lambda text: text,
    "huge": lambda text: "x" * int(text),
    "process": lambda _: _process(),
    "read": lambda path: pathlib.Path(path).read_text(),
    "ls": lambda path: json.dumps(sorted(os.listdir(path))),
    "garbage": lambda _: os.write(int(os.environ["ROOST_FD"]), b"\xff" * 64) and time.sleep(60),
    "stderr": lambda text: print(text, file=sys.stderr) or "ok",
}


@agent.turn
def probe(turn):
    command, _, argument = turn.message.partition(" ")
    if command == "say":
        turn.say(argument)
        return argument
    return COMMANDS[command](argument)
