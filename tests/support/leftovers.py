"""What Roost leaves on a machine, counted: processes, cgroups, mounts, network namespaces, files in TMPDIR.

Only what this run of the tests made, for other meshes may be at work on the machine: its processes carry a
mark in their environment, and everything else has the name of a directory that it gave them.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path

import psutil

from edge_agent.jail.cgroups import parent_name

MARK = "ROOST_TEST_RUN"  # in the environment of this process, and so of all that come from it


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


def count(directory: Path) -> Leftovers:
    """`directory` is the test's own, in which all of its meshes have their data."""
    processes = _processes()
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    return Leftovers(
        processes=frozenset(f"{p.pid} {name}" for p, name in processes),
        cgroups=frozenset(_cgroups(directory)),
        mounts=frozenset(m for line in mounts if str(directory) in (m := line.split()[4])),
        network_namespaces=frozenset(_network_namespaces(processes)),
        temporary=frozenset(os.listdir(os.environ["TMPDIR"])),
    )


def jail_groups(data_dir: Path) -> list[Path]:
    """The control groups of the jails of the node whose data is in `data_dir`."""
    return [path for path in Path("/sys/fs/cgroup").glob(f"*/{parent_name(data_dir)}/*") if path.is_dir()]


def _processes() -> list[tuple[psutil.Process, str]]:
    """An agent's own environment is empty: that its init is gone means that it is too."""
    mark = f"{MARK}={os.environ[MARK]}".encode()
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            environment = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
            if mark in environment and process.status() != psutil.STATUS_ZOMBIE:
                found.append((process, " ".join(process.cmdline())[:100]))
    return [(process, name) for process, name in found if process.pid != os.getpid()]


def _cgroups(directory: Path) -> list[str]:
    """Those of nodes whose data is beneath `directory`; a node's data directory is the one with `jails`."""
    return [
        str(group)
        for jails in directory.rglob("jails")
        for place in (".", "*")
        for group in Path("/sys/fs/cgroup").glob(f"{place}/{parent_name(jails.parent)}")
    ]


def _network_namespaces(processes: list[tuple[psutil.Process, str]]) -> list[str]:
    named = Path("/run/netns")
    found = {path.name for path in named.iterdir()} if named.exists() else set()
    mine = os.readlink("/proc/self/ns/net")
    for process, _ in processes:
        with suppress(OSError):
            found.add(os.readlink(f"/proc/{process.pid}/ns/net"))
    return sorted(found - {mine})
