"""The installed service on a booted Debian: systemd's hardening, cgroup v2, each way to start, restarts.

Run by `make test-vm` inside the box alone: it starts and stops the machine's own roost-edge.service.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.support.eventually import eventually
from tests.support.mesh import AGENTS, Mesh, running_mesh

if "ROOST_IN_VM" not in os.environ:
    pytest.skip("only inside the box of make test-vm", allow_module_level=True)

UNIT = "roost-edge.service"
CONFIG = Path("/etc/roost/edge.toml")
GROUP = Path("/sys/fs/cgroup/system.slice") / UNIT
SLOW = 300.0  # seconds: an emulated machine
_WAY = re.compile(r"default/probe/(\w+): (parked|zygote|exec), ")


def systemctl(*arguments: str) -> str:
    done = subprocess.run(
        ["systemctl", *arguments], capture_output=True, text=True, timeout=SLOW, check=False
    )
    return done.stdout.strip()


def configure(coordinator: str) -> None:
    text = CONFIG.read_text().replace('"127.0.0.1:7300"', f'"{coordinator}"')
    text = text.replace('"0.0.0.0:7400"', '"127.0.0.1:7400"').replace("192.0.2.10", "127.0.0.1")
    CONFIG.write_text(re.sub(r"^node = .*$", 'node = "box"', text, flags=re.MULTILINE))


def journal() -> str:
    command = ["journalctl", "-u", UNIT, "-o", "cat", "-b"]
    return subprocess.run(command, capture_output=True, text=True, timeout=SLOW, check=True).stdout


def ways(user: str) -> list[str]:
    return [way for name, way in _WAY.findall(journal()) if name == user]


@pytest.fixture
def service() -> Iterator[None]:
    before = CONFIG.read_text()
    yield
    systemctl("stop", UNIT)
    CONFIG.write_text(before)


@pytest.fixture
async def mesh(tmp_path: Path, service: None) -> AsyncIterator[Mesh]:
    """A coordinator and this machine's service as its only node."""
    async with running_mesh(tmp_path, nodes=(), ttl=30.0) as mesh:
        configure(mesh.addresses[0])
        assert systemctl("is-enabled", UNIT) == "enabled"
        systemctl("restart", UNIT)
        await mesh.wait_up("box", timeout=SLOW)
        yield mesh


async def append(mesh: Mesh, user: str, text: str) -> list[str]:
    """What the user's instance has been told, with `text` as the newest."""
    async with mesh.client() as client, client.attach("probe", user) as chat:
        lines: list[str] = json.loads((await chat.send(f"append {text}", timeout=SLOW)).text)
        return lines


async def deploy(mesh: Mesh) -> None:
    """So small that a box with two cores has room for all users of a test."""
    await mesh.deploy(AGENTS / "probe", start_timeout='"60s"', turn_timeout='"120s"', cpu="0.1")


@pytest.mark.timeout(1800)
async def test_every_way_to_start_works_under_the_unit(mesh: Mesh) -> None:
    await deploy(mesh)
    assert await append(mesh, "ann", "a") == ["a"]
    assert ways("ann") == ["exec"], journal()
    await eventually(lambda: "the zygote of" in journal(), SLOW, "a zygote")
    assert "is ready after" in journal(), journal()
    seen: set[str] = set()
    for number in range(12):
        user = f"user{number}"
        assert await append(mesh, user, user) == [user]
        seen |= set(ways(user))
        if seen >= {"parked", "zygote"}:
            break
        if "zygote" in seen:
            await asyncio.sleep(5.0)  # until one is parked
    assert seen >= {"parked", "zygote"}, journal()
    assert await append(mesh, "ann", "b") == ["a", "b"]
    assert [path for path in GROUP.rglob("agent") if path.is_dir()], "the jails lie beneath the unit's group"


@pytest.mark.timeout(1800)
async def test_state_survives_a_restart_of_the_service(mesh: Mesh) -> None:
    await deploy(mesh)
    assert await append(mesh, "bob", "one") == ["one"]
    systemctl("restart", UNIT)
    await mesh.wait_up("box", timeout=SLOW)
    assert await append(mesh, "bob", "two") == ["one", "two"]


@pytest.mark.timeout(1800)
async def test_stopping_the_service_leaves_nothing(mesh: Mesh) -> None:
    await deploy(mesh)
    await append(mesh, "eve", "x")
    assert GROUP.exists()
    systemctl("stop", UNIT)
    assert systemctl("show", "-p", "Result", "--value", UNIT) == "success"
    assert not GROUP.exists()
