"""Links that appear while the node looks: an agent swaps a directory of its state for one, all the time."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path

import pytest

from edge_agent.jail.api import Jail
from edge_agent.state.files import Entry, Kind
from shared.errors import RoostError
from tests.support.jailer import BUNDLE, RunningJailer

# renameat2 with RENAME_EXCHANGE: at no time is there nothing.
SWAP = """
import ctypes, os
libc = ctypes.CDLL(None)
os.makedirs('/state/d'); open('/state/d/f', 'w').write('mine')
os.symlink(recv().decode(), '/state/link')
send(b'.')
while True: libc.renameat2(-100, b'/state/d', -100, b'/state/link', 2)
"""
_TRIES = 300


@pytest.fixture
def outside(jailer: RunningJailer) -> Path:
    """A directory of the host's, open to all, with a file of the same name."""
    directory = jailer.data_dir.parent / "outside"
    directory.mkdir()
    directory.chmod(0o777)
    (directory / "f").write_text("the host's")
    (directory / "f").chmod(0o666)
    return directory


@pytest.fixture(params=["exec", "zygote"])
def way(request: pytest.FixtureRequest) -> str:
    """Who serves the files: the jail's own init, or the node's file service."""
    return str(request.param)


async def _swapping(jailer: RunningJailer, way: str, outside: Path) -> Jail:
    jail = await jailer.started(way, "a", SWAP)
    await jail.send(str(outside).encode())
    await jail.receive()
    return jail


async def test_no_swap_makes_the_node_read_outside(jailer: RunningJailer, way: str) -> None:
    """Not even of what init can see, like the agent's version."""
    jailer.bundle(BUNDLE, {"f": "the version's"})
    jail = await _swapping(jailer, way, Path("/agent"))
    read = set()
    for _ in range(_TRIES):
        with contextlib.suppress(FileNotFoundError, RoostError):
            fd = await jail.files.open_read("d/f")
            read.add(os.read(fd, 100))
            os.close(fd)
        with contextlib.suppress(RoostError):
            assert all("f" not in e.path or e.size == len("mine") for e in await jail.files.scan())
    assert read == {b"mine"}, "and it was there now and then"


async def test_no_swap_makes_the_node_write_outside(jailer: RunningJailer, way: str, outside: Path) -> None:
    jail = await _swapping(jailer, way, outside)
    for i in range(_TRIES):
        with contextlib.suppress(FileNotFoundError, RoostError):
            fd = await jail.files.open_write(f"d/{i}")
            os.write(fd, b"the node's")
            os.close(fd)
            await jail.files.commit_write(Entry(f"d/{i}", Kind.FILE, 0o600, size=10))
    assert os.listdir(outside) == ["f"]
    assert (outside / "f").read_text() == "the host's"


async def test_no_swap_makes_the_node_remove_outside(jailer: RunningJailer, way: str, outside: Path) -> None:
    jail = await _swapping(jailer, way, outside)
    for _ in range(_TRIES):
        with contextlib.suppress(FileNotFoundError, RoostError):
            await jail.files.remove("d/f")
    await jail.kill()
    async with asyncio.timeout(10.0):
        await jailer.jails.discard("a")
    assert (outside / "f").read_text() == "the host's"
