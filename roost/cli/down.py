"""`roost down`: stops the mesh that `roost up` runs on this machine. Nothing to stop is no error."""

from __future__ import annotations

import argparse

from roost.cli._common import Commands, add_command
from roost.cli.up import add_data, data_of
from roost.up.running import take_down
from shared.errors import Reason, RoostError


def add(commands: Commands, common: argparse.ArgumentParser) -> None:
    add_data(add_command(commands, common, "down", "stop the mesh that `roost up` runs here", run))


def run(args: argparse.Namespace) -> int:
    try:
        stopped = take_down(data_of(args))
    except PermissionError as error:
        raise RoostError(Reason.BAD_REQUEST, "the mesh here belongs to root", "sudo roost down") from error
    print("Roost is down." if stopped else "Nothing to stop: no mesh runs here.")
    return 0
