"""Control groups: which kind this machine has."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from edge_agent.jail.cgroups.base import Cgroups
from edge_agent.jail.cgroups.v1 import CONTROLLERS, V1
from edge_agent.jail.cgroups.v2 import V2
from edge_agent.jail.protocol import Refused

_MOUNTS = Path("/sys/fs/cgroup")


def parent_name(data_dir: Path) -> str:
    """One name for one node's data: two nodes never share a group, and a successor finds its own again."""
    return "roost-" + hashlib.sha256(os.fsencode(data_dir.resolve())).hexdigest()[:12]


def detect(data_dir: Path, mounts: Path = _MOUNTS) -> Cgroups:
    """v2 where it has the memory controller, else v1. Refused if neither is there."""
    name = parent_name(data_dir)
    controllers = mounts / "cgroup.controllers"
    if controllers.exists() and "memory" in controllers.read_text().split():
        own = _own_group(mounts)
        return V2(own or mounts, name, own is not None, disk_of(data_dir))
    missing = [c for c in CONTROLLERS if not (mounts / c / "cgroup.procs").exists()]
    if missing:
        raise Refused(
            f"this machine has no control groups for {', '.join(missing)} at {mounts}",
            "mount cgroup2 there (systemd does), or the v1 controllers one by one",
        )
    return V1(mounts, name, disk_of(data_dir))


def disk_of(directory: Path, sys: Path = Path("/sys")) -> str | None:
    """The numbers of the whole disk that `directory` is on; None if it is on no block device, or on several
    as one (btrfs, overlay)."""
    status = os.stat(directory)
    numbers = f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}"
    device = sys / "dev/block" / numbers
    if not device.exists():
        return None
    whole = device.resolve().parent if (device / "partition").exists() else device
    return (whole / "dev").read_text().strip()


def _own_group(mounts: Path) -> Path | None:
    """The jailer's own group, if systemd has delegated it (Delegate=yes)."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        number, _, path = line.split(":", 2)
        if number == "0" and path != "/":
            own = mounts / path.lstrip("/").removesuffix("/supervisor")
            for attribute in ("user.delegate", "trusted.delegate"):
                try:
                    if os.getxattr(own, attribute) == b"1":
                        return own
                except OSError:
                    continue
    return None
