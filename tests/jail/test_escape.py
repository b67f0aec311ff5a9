"""The escape matrix: each hazard is tried in jails of each way to start, and the walls hold.
docs/security/jail.md says what stops it; `make bench NAME=escape` shows other sandboxes beside it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.jail.probe.__main__ import HAZARDS
from tests.support.escape import Report, canaries, probe_in_jails
from tests.support.jailer import needs_root
from tests.support.starting import WAYS

PAGE = Path(__file__).parents[2] / "docs" / "security" / "jail.md"


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Report]:
    directory = tmp_path_factory.mktemp("canaries")
    with canaries(directory) as environment:
        return asyncio.run(probe_in_jails(environment))


@needs_root
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("hazard", HAZARDS)
def test_the_wall_holds(reports: dict[str, Report], hazard: str, way: str) -> None:
    held, what = reports[way][hazard]
    assert held, f"{hazard}: {what}"


# What stops a hazard can be told from how it failed: the filter, not just the lack of a capability or module.
FILTERED = {
    "user namespace by unshare": "EPERM",
    "user namespace by clone": "EPERM",
    "user namespace by clone3": "ENOSYS",
    "open_by_handle_at (dac_read_search)": "EPERM",
    "name_to_handle_at": "EPERM",
    "userfaultfd": "EPERM",
    "io_uring": "EPERM",
    "keyring: add a key": "EPERM",
    "ptrace": "EPERM",
    "read another process's memory (process_vm_readv)": "EPERM",
    "kernel crypto (AF_ALG)": "EAFNOSUPPORT",
    "vsock, to the hypervisor": "EAFNOSUPPORT",
    "rare protocols (SCTP)": "EPROTONOSUPPORT",
    "netlink: uevents": "EPROTONOSUPPORT",
    "push input into a terminal (TIOCSTI)": "EPERM",
    "turn off address randomisation": "EPERM",
    "pages shared with other users' (KSM)": "EINVAL",
    "32-bit system calls": "killed by SIGSYS",
    "memory bomb": "killed by SIGKILL",
    "fork bomb": "EAGAIN",
    "fill /tmp": "ENOSPC",
    "fill /dev/shm": "ENOSPC",
    "one file of any size": "EFBIG",
    "descriptors without end": "EMFILE",
    "abstract unix socket of the host": "ECONNREFUSED",
    "connect to a port of the host": "ECONNREFUSED",
    "a way out: TCP or UDP to another machine": "ENETUNREACH",
    "a way out: DNS": "ENETUNREACH",
    "signal a process of the host": "ESRCH",
    "signal another instance": "ESRCH",
    "a way out: the cloud's metadata service": "ENETUNREACH",
    "mount the host's disk": "EPERM",
}


@needs_root
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("hazard", "how"), FILTERED.items())
def test_what_stops_it(reports: dict[str, Report], hazard: str, how: str, way: str) -> None:
    outcome = reports[way][hazard]
    if hazard == "32-bit system calls" and outcome[1] == "nothing there":
        pytest.skip("this machine has none")
    assert outcome == [True, how]


# Harmless to try without any jail, where they work: so the probe, and the canaries, can be trusted.
OPEN = (
    "abstract unix socket of the host",
    "container engine's socket",
    "connect to a port of the host",
    "signal a process of the host",
    "read a process of the host",
    "read a file of the host or of another instance",
    "shared memory of the host",
    "memory of another instance",
    "signal another instance",
    "files in the host's /dev/shm or /tmp",
    "secrets in the environment",
    "capabilities, in any set",
    "run as the host's root",
    "no no_new_privs",
    "no system call filter",
    "feed the host's core dump program",
    "name_to_handle_at",
    "ptrace",
    "compare kernel objects (kcmp)",
    "read another process's memory (process_vm_readv)",
    "netlink: uevents",
    "user namespace by unshare",
)


@needs_root
def test_the_probe_finds_what_is_open(tmp_path: Path) -> None:
    with canaries(tmp_path) as environment:
        done = subprocess.run(
            [sys.executable, "-m", "tests.jail.probe", *OPEN],
            env={**os.environ, **environment},
            capture_output=True,
            check=True,
            timeout=60,
        )
    assert [name for name, (held, _) in json.loads(done.stdout).items() if held] == []


def test_the_page_lists_every_hazard_and_no_other() -> None:
    table = (
        PAGE.read_text().split("## The escape matrix")[1].split("\nHazards that are tried from outside")[0]
    )
    listed = {
        part for row in re.findall(r"^\| (.+?) \|", table, re.M) for part in re.findall(r"`([^`]+)`", row)
    }
    assert listed == set(HAZARDS)
