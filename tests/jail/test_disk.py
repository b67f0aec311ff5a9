"""A jail that fills the disk, or has it all for itself."""

from __future__ import annotations

import asyncio
import dataclasses
import time

import pytest

from edge_agent.jail import cgroups
from edge_agent.jail.api import Exit, Jail, JailGone
from shared.resources import Disk
from tests.support.jailer import RunningJailer, python, spec

MIB = 1 << 20
SMALL = Disk(state_bytes=24 * MIB)

# Files that are smaller than what one may have, until something stops it.
FILL = """
data = bytes(1 << 20)
count = 0
while True:
    count += 1
    try:
        with open(f"/state/f{count}", "wb") as f:
            for _ in range(8): f.write(data)
    except OSError as e:
        send(f"{e.errno}".encode())
        recv()
    if count == 60: send(b"wrote")
"""


async def _made(jailer: RunningJailer, code: str, disk: Disk, way: str = "exec") -> Jail:
    made = spec("a", python(code))
    if way == "zygote":
        made = dataclasses.replace(made, bundle="v2", zygote=(await jailer.zygote("v2", code)).jail_id)
    return await jailer.jails.make(dataclasses.replace(made, disk=disk))


async def _gone(jail: Jail, timeout: float = 20.0) -> Exit:
    async with asyncio.timeout(timeout):
        try:
            while True:
                await jail.receive()
        except JailGone as gone:
            return gone.exit


@pytest.mark.parametrize("way", ["exec", "zygote"])
async def test_a_jail_that_fills_its_state_is_stopped(jailer: RunningJailer, way: str) -> None:
    jail = await _made(jailer, FILL, SMALL, way)
    await jail.start()
    if "limited by the kernel" in jailer.log():
        assert await jail.receive() == b"122", "EDQUOT"
        return
    exit = await _gone(jail)
    assert (exit.code, exit.disk_full, exit.out_of_memory) == (-9, True, False)


async def test_one_file_is_stopped_by_itself(jailer: RunningJailer) -> None:
    code = """
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    with open("/state/big", "wb") as f:
        while True: f.write(bytes(1 << 20))
except OSError as e: send(f"{e.errno}".encode())
while True: recv()
"""
    jail = await _made(jailer, code, SMALL)
    await jail.start()
    async with asyncio.timeout(10.0):
        assert await jail.receive() in (b"27", b"122"), "EFBIG, or EDQUOT"


async def test_a_jail_that_has_little_is_left_alone_when_another_fills_the_disk(
    jailer: RunningJailer,
) -> None:
    busy = """
import time
with open("/state/f", "wb") as f: f.write(bytes(20 << 20))
end = time.monotonic() + 4
while time.monotonic() < end: pass
send(b"alive")
while True: recv()
"""
    other = dataclasses.replace(spec("b", python(busy)), disk=SMALL)
    good = await jailer.jails.make(other)
    await good.start()
    bad = await _made(jailer, FILL, SMALL)
    await bad.start()
    if "limited by the kernel" not in jailer.log():
        assert (await _gone(bad)).disk_full
    async with asyncio.timeout(20.0):
        assert await good.receive() == b"alive"
    assert not good.ended


async def test_reading_is_as_slow_as_it_was_asked_for(jailer: RunningJailer) -> None:
    groups = cgroups.detect(jailer.data_dir)
    if not groups.limits_io:
        pytest.skip("reading and writing can't be limited here")
    code = f"""
import os, time
with open("/state/f", "wb") as f:
    f.write(os.urandom({4 * MIB}))
    os.fsync(f.fileno())
    os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
began = time.monotonic()
with open("/state/f", "rb") as f:
    while f.read(1 << 16): pass
send(str(time.monotonic() - began).encode())
while True: recv()
"""
    for rate, least, most in ((0, 0.0, 1.5), (2 * MIB, 1.5, 10.0)):
        jail = await _made(jailer, code, Disk(64 * MIB, read_bps=rate))
        await jail.start()
        async with asyncio.timeout(30.0):
            took = float(await jail.receive())
        await jail.kill()
        assert least <= took <= most, f"4 MiB at {rate} bytes a second took {took:.2f} s"


async def test_writing_past_the_cache_is_as_slow_as_it_was_asked_for(jailer: RunningJailer) -> None:
    if not cgroups.detect(jailer.data_dir).limits_io:
        pytest.skip("reading and writing can't be limited here")
    code = """
import mmap, os, time
block = mmap.mmap(-1, 1 << 18)
fd = os.open("/state/f", os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
began = time.monotonic()
for _ in range(16): os.write(fd, block)
send(str(time.monotonic() - began).encode())
while True: recv()
"""
    jail = await _made(jailer, code, Disk(64 * MIB, write_bps=2 * MIB))
    began = time.monotonic()
    await jail.start()
    async with asyncio.timeout(30.0):
        assert float(await jail.receive()) > 1.5, "4 MiB at 2 MiB a second"
    assert time.monotonic() - began < 20
