"""The directory in which all of a run lies, and how what lies there is ended."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PREFIX = "roost-bench-"
_SECONDS = 60.0


@contextmanager
def place() -> Iterator[Path]:
    """Anybody may enter it. What runs that were killed have left is removed first."""
    for left in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with _owned(left) as mine:
            if mine:
                _remove(left)
    directory = Path(tempfile.mkdtemp(prefix=_PREFIX))
    directory.chmod(0o755)
    with _owned(directory):
        try:
            yield directory
        finally:
            _remove(directory)


@contextmanager
def _owned(directory: Path) -> Iterator[bool]:
    """Does nobody else run in it? While the block lasts, nobody else may."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(fd)


def _remove(directory: Path) -> None:
    """What runs there ends with the run's own process; this removes its control groups, mounts and files."""
    commands = [runc_of(directory, "delete", "--force", c.name) for c in directory.glob("runc/state/*")]
    if (directory / "podman").exists():
        commands.append(podman_of(directory, "rm", "--all", "--force", "--time=0"))
    for config in directory.glob("*/edge*.toml"):
        commands.append([sys.executable, "-m", "edge_agent", "--config", str(config), "--clean"])
    for command in commands:
        subprocess.run(command, check=False, capture_output=True, timeout=_SECONDS)
    shutil.rmtree(directory)


def runc_of(directory: Path, *arguments: str) -> list[str]:
    return ["runc", "--root", str(directory / "runc" / "state"), *arguments]


def podman_of(directory: Path, *arguments: str) -> list[str]:
    """Its own storage, which need not hold anything: a container's root is a directory here."""
    places = ["--root", str(directory / "podman" / "root"), "--runroot", str(directory / "podman" / "run")]
    fixed = ["--storage-driver", "vfs", "--runtime", "runc", "--cgroup-manager", "cgroupfs"]
    return ["podman", *places, *fixed, "--events-backend", "none", *arguments]
