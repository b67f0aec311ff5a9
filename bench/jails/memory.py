"""What processes take, as the kernel accounts for it: PSS shares each shared page among those who have it."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil

from tests.support.mesh import Mesh

MB = float(1 << 20)


def pss(pids: Iterable[int]) -> float:
    """Of all together, in MB. Those that have ended have none."""
    return sum(map(_pss, pids)) / MB


def _pss(pid: int) -> int:
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) << 10
    return 0


def available() -> float:
    """What the machine could still give, in MB."""
    return psutil.virtual_memory().available / MB


def pids_by_uid() -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess):
            found.setdefault(process.uids().real, []).append(process.pid)
    return found


def pids_of_jails(states: Iterable[Path]) -> list[list[int]]:
    """For each `state` directory the pids of its jail: of the agent, which owns it, and of its init, whose
    uid is one less."""
    by_uid = pids_by_uid()
    uids = [state.stat().st_uid for state in states]
    return [by_uid.get(uid, []) + by_uid.get(uid - 1, []) for uid in uids]


def live_jails(mesh: Mesh, node: str, agent: str) -> list[list[int]]:
    """The pids of each jail of `agent` in which a turn was served."""
    states = mesh.data_dir(node).glob(f"jails/{agent}-*/state")
    return [pids for pids in pids_of_jails(s for s in states if any(s.iterdir())) if pids]
