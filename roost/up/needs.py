"""What `roost up` needs of this machine: pure, from what was found to what is missing and how to get it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from dataclasses import dataclass

from shared.errors import Reason, RoostError

_MODULES = {
    "coordinator": ("coordinator", "etcd3aio", "obstore"),
    "edge": ("edge_agent", "cgroupspy", "zeroconf"),
}


@dataclass(frozen=True, slots=True)
class Machine:
    platform: str
    root: bool
    etcd: str | None  # its path
    absent: tuple[str, ...]  # extras of the package whose modules can't be found


def look() -> Machine:
    absent = tuple(
        extra for extra, modules in _MODULES.items() if not all(map(importlib.util.find_spec, modules))
    )
    return Machine(sys.platform, os.geteuid() == 0, shutil.which("etcd"), absent)


def check(machine: Machine) -> str:
    """The path of etcd. RoostError names the first thing that is missing, and the command that gets it."""
    if machine.platform != "linux":
        raise _missing(
            f"`roost up` needs Linux, of whose namespaces jails are made; this is {machine.platform}",
            "run it in a Linux virtual machine, or talk to a mesh elsewhere with --coordinator HOST:PORT",
        )
    if machine.absent:
        wanted = ",".join((*machine.absent, "cli"))
        raise _missing(
            f"parts of roost are not installed here: {', '.join(machine.absent)}",
            f"pip install 'roost[{wanted}]'",
        )
    if machine.etcd is None:
        raise _missing("etcd is not installed here", "apt-get install --yes etcd-server")
    if not machine.root:
        raise _missing("`roost up` must make jails, which needs root", "sudo roost up")
    return machine.etcd


def _missing(message: str, hint: str) -> RoostError:
    return RoostError(Reason.BAD_REQUEST, message, hint)
