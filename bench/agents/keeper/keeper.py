"""Keeps as much state as it is told to, and changes as much of it: `COMMAND FIRST COUNT BYTES`."""

import os
import pathlib

from roost import Agent

agent = Agent()
FILES = pathlib.Path("/state/files")


def _write(first, count, size):
    """Files of so many random bytes: COUNT of them, from the FIRST on."""
    FILES.mkdir(exist_ok=True)
    for number in range(first, first + count):
        (FILES / f"{number:06}").write_bytes(os.urandom(size))


def _touch(first, count, size):
    """Changes the first bytes of such files."""
    for number in range(first, first + count):
        with (FILES / f"{number:06}").open("r+b") as f:
            f.write(os.urandom(size))


COMMANDS = {"write": _write, "touch": _touch, "nothing": lambda first, count, size: None}


@agent.turn
def keep(turn):
    command, *numbers = turn.message.split()
    COMMANDS[command](*map(int, numbers))
    turn.say("done")  # what a user sees first; the commit begins when this handler returns
    return "done"
