"""What Roost leaves on a machine, counted: processes, cgroups, mounts, network namespaces, files in /tmp."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path

import psutil

from edge_agent.jail.cgroups import parent_name

_MODULES = ("edge_agent", "edge_agent.daemon", "coordinator", "roost.cli.main")


@dataclass(frozen=True, slots=True)
class Leftovers:
    processes: frozenset[str]
    cgroups: frozenset[str]
    mounts: frozenset[str]
    network_namespaces: frozenset[str]
    temporary: frozenset[str]

    def since(self, before: Leftovers) -> dict[str, list[str]]:
        """What is here now and was not before; empty when nothing was left behind."""
        return {
            f.name: sorted(new)
            for f in fields(self)
            if (new := getattr(self, f.name) - getattr(before, f.name))
        }


def count() -> Leftovers:
    return Leftovers(
        processes=frozenset(_processes()),
        cgroups=frozenset(_cgroups()),
        mounts=frozenset(line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()),
        network_namespaces=frozenset(_network_namespaces()),
        temporary=frozenset(name for name in os.listdir("/tmp") if "roost" in name),
    )


def _processes() -> list[str]:
    """Ours: by what they run, or as jailed (in another pid namespace than this process)."""
    mine = os.readlink("/proc/self/ns/pid")
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            command = process.cmdline()
            jailed = os.readlink(f"/proc/{process.pid}/ns/pid") != mine
            ours = len(command) > 2 and command[1] == "-m" and command[2] in _MODULES
            if (jailed or ours) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(f"{process.pid} {' '.join(command)[:100]}")
    return found


def _cgroups() -> list[str]:
    return [str(path) for path in Path("/sys/fs/cgroup").glob("*/roost*") if path.is_dir()] + [
        str(path) for path in Path("/sys/fs/cgroup").glob("roost*") if path.is_dir()
    ]


def _network_namespaces() -> list[str]:
    found = set()
    for pid in os.listdir("/proc"):
        if pid.isdecimal():
            with suppress(OSError):
                found.add(os.readlink(f"/proc/{pid}/ns/net"))
    return sorted(found)


def jail_groups(data_dir: Path) -> list[Path]:
    """The control groups of the jails of the node whose data is in `data_dir`."""
    return [path for path in Path("/sys/fs/cgroup").glob(f"*/{parent_name(data_dir)}/*") if path.is_dir()]
