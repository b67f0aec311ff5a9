"""`roost` as it is typed, a process of its own, against a scripted mesh; also on a terminal."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from protos.v1 import admin_pb2, common_pb2
from tests.support.eventually import eventually
from tests.support.fake_mesh import FakeCoordinator, FakeMesh, FakeNode


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.out.count("\n") == 1, "exactly one object, on one line"
        return json.loads(self.out)


@dataclass
class Cli:
    coordinator: FakeCoordinator
    north: FakeNode
    south: FakeNode
    home: Path

    async def run(self, *args: str, stdin: str = "", there: bool = True) -> Result:
        options = ["--coordinator", self.coordinator.address] if there else []
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "roost.cli.main",
            *options,
            *args,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=self.env(),
        )
        async with asyncio.timeout(40):
            out, err = await process.communicate(stdin.encode())
        assert process.returncode is not None
        return Result(process.returncode, out.decode(), err.decode())

    def env(self) -> dict[str, str]:
        env = {k: v for k, v in os.environ.items() if k != "ROOST_COORDINATORS"}
        return {**env, "XDG_DATA_HOME": str(self.home), "TERM": "xterm-256color"}


@pytest.fixture
async def cli(tmp_path: Path) -> AsyncIterator[Cli]:
    async with FakeMesh() as mesh:
        north, south = FakeNode("north"), FakeNode("south")
        coordinator = FakeCoordinator(north, south)
        await mesh.add(north, south, coordinator)
        coordinator.status = status(north.address)
        yield Cli(coordinator, north, south, tmp_path)


def status(address: str) -> admin_pb2.StatusReply:
    node = common_pb2.NodeInfo(
        id="north",
        role=common_pb2.EDGE,
        site="attic",
        address=address,
        position=common_pb2.Position(latitude=59.91, longitude=10.75),
        capacity=common_pb2.Resources(memory_bytes=2 << 30, cpu_millis=2000, pids=1000),
        api_version="v1",
        started_id="s1",
    )
    cloud = common_pb2.NodeInfo(id="cloud-1", role=common_pb2.CLOUD, site="cloud")
    return admin_pb2.StatusReply(
        nodes=[
            admin_pb2.NodeStatus(
                node=node,
                state="up",
                reserved=common_pb2.Resources(memory_bytes=512 << 20, cpu_millis=500, pids=64),
                instances=1,
                load=0.25,
                rtt_ms=1.5,
                peers=["south"],
                coordinator="c1",
            ),
            admin_pb2.NodeStatus(node=cloud, state="suspect", load=-1, rtt_ms=-1, coordinator="c1"),
        ],
        instances=[
            admin_pb2.InstanceStatus(
                key=common_pb2.InstanceKey(tenant="default", agent="chef", user="ana"),
                node="north",
                epoch=3,
                version=7,
                phase="live",
                why="nearest with room \x1b[31m",
                last_turn="t9",
            )
        ],
        agents=[common_pb2.AgentSpec(tenant="default", name="chef", version="abc")],
        coordinator="c1",
    )


class Screen:
    """A program on a terminal of its own: what it writes, and what is typed to it."""

    def __init__(self, fd: int, process: asyncio.subprocess.Process) -> None:
        self.text = ""
        self._fd = fd
        self._process = process
        asyncio.get_running_loop().add_reader(fd, self._read)

    def type(self, keys: str) -> None:
        os.write(self._fd, keys.encode())

    async def shows(self, text: str) -> None:
        await eventually(lambda: text in self.text, 20, f"{text!r} on the screen")

    async def ended(self) -> int:
        return await asyncio.wait_for(self._process.wait(), 20)

    def close(self) -> None:
        if self._process.returncode is None:
            self._process.kill()
        asyncio.get_running_loop().remove_reader(self._fd)
        os.close(self._fd)

    def _read(self) -> None:
        try:
            self.text += os.read(self._fd, 65536).decode(errors="replace")
        except OSError:  # the program has closed its side
            asyncio.get_running_loop().remove_reader(self._fd)


@asynccontextmanager
async def terminal(cli: Cli, *args: str) -> AsyncIterator[Screen]:
    main, sub = pty.openpty()
    command = [sys.executable, "-m", "roost.cli.main", "--coordinator", cli.coordinator.address, *args]
    # By way of setsid, so that the terminal is its own, and Ctrl-C typed there reaches it.
    process = await asyncio.create_subprocess_exec(
        "setsid",
        "--ctty",
        *command,
        stdin=sub,
        stdout=sub,
        stderr=sub,
        env={**cli.env(), "COLUMNS": "160"},
    )
    os.close(sub)
    screen = Screen(main, process)
    try:
        yield screen
    finally:
        screen.close()
        await process.wait()
