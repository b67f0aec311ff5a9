"""The kernel's quotas, on a file system that has them. Skipped on a kernel that has none."""

from __future__ import annotations

import asyncio
import dataclasses
import subprocess
from pathlib import Path

import pytest

from edge_agent.jail.api import Jail
from shared.resources import Disk
from tests.support.jailer import RunningJailer, is_root, python, running_jailer, spec
from tests.support.quota_disk import make_image

MIB = 1 << 20
SMALL = Disk(state_bytes=24 * MIB)
FILL = """
import os
def fill(keep):
    opened, count = [], 0
    try:
        while True:
            f = open(f"/state/f{count}", "wb")
            opened.append(f)
            if not keep: os.unlink(f.name)
            for _ in range(4): f.write(bytes(1 << 20))
            f.flush()
            count += 1
    except OSError as e: return f"{e.errno} {count * 4}"
    finally:
        for f in opened:
            try: f.close()
            except OSError: pass
while True: send(fill(recv() == b"keep").encode())
"""


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not is_root():
        pytest.skip("mounting needs root")
    path = tmp_path_factory.mktemp("disk") / "image"
    if problem := make_image(path):
        pytest.skip(f"no file system with quotas here: {problem}")
    return path


async def _says(jail: Jail, word: bytes) -> list[int]:
    await jail.send(word)
    async with asyncio.timeout(60.0):
        return [int(n) for n in (await jail.receive()).split()]


async def _made(jailer: RunningJailer, jail_id: str) -> Jail:
    jail = await jailer.jails.make(dataclasses.replace(spec(jail_id, python(FILL)), disk=SMALL))
    await jail.start()
    return jail


async def test_writing_fails_at_the_quota_and_the_agent_goes_on(image: Path) -> None:
    async with running_jailer(image=image) as jailer:
        assert "limited by the kernel" in jailer.log()
        one = await _made(jailer, "a")
        assert await _says(one, b"unlinked") == [122, 24], "EDQUOT, for what is deleted but open, too"
        assert await _says(one, b"keep") == [122, 24]
        two = await _made(jailer, "b")
        assert await _says(two, b"keep") == [122, 24], "each has its own"
        assert await _says(one, b"keep") == [122, 24]
        assert not one.ended


def test_nothing_of_it_stays_mounted(image: Path) -> None:
    assert str(image) not in Path("/proc/self/mountinfo").read_text()
    used = subprocess.run(["losetup", "-j", str(image)], check=True, capture_output=True, text=True)
    assert used.stdout == ""
