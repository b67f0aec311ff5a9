"""Random system calls with half-sensible arguments, by trinity, in a jail: the host does not notice."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from edge_agent.jail.api import JailGone
from shared.resources import Resources
from tests.support.escape import canaries
from tests.support.jailer import ECHO, RunningJailer, python, spec

_SHORT, _LONG = 5.0, 20.0  # seconds
_LIMITS = Resources(memory_bytes=256 << 20, cpu_millis=1500, pids=64)
_TRINITY = shutil.which("trinity")

# Only descriptors that it gets: for others, like those of perf, it asks without end.
_KINDS = "pipes,epoll,eventfd,timerfd,memfd,testfile"
_ARGV = [_TRINITY, "-q", "-a", "64", "-C", "16", "-N", "10000000", "-l", "off", f"--enable-fds={_KINDS}"]
# It ends itself now and then, by a signal or by taking all memory, and may end this program with it.
FUZZ = """
import subprocess, time
began = time.monotonic()
while (left := began + @SECONDS@ - time.monotonic()) > 0:
    p = subprocess.Popen(@ARGV@, cwd="/tmp", stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try: p.wait(left)
    except subprocess.TimeoutExpired: p.kill()
send(b"done")
while True: recv()
""".replace("@ARGV@", repr(_ARGV))


def _host() -> tuple[str, ...]:
    """What must be as before."""
    sysctls = ("kernel/core_pattern", "kernel/hostname", "kernel/modprobe", "vm/overcommit_memory")
    texts = (Path("/proc/sys", name).read_text() for name in sysctls if Path("/proc/sys", name).exists())
    return tuple(texts)


async def _fuzz(jailer: RunningJailer, seconds: float) -> float:
    """Runs a jail until its time is over, or it has ended itself; the processor time that it has used."""
    program = python(FUZZ.replace("@SECONDS@", str(seconds)))
    jail = await jailer.jails.make(spec("fuzz", program, _LIMITS))
    used = 0.0
    try:
        await jail.start()
        waiting = asyncio.ensure_future(jail.receive())
        async with asyncio.timeout(seconds + 30):
            while not (await asyncio.wait({waiting}, timeout=0.2))[0]:
                used = (await jail.usage()).cpu_seconds
        assert await waiting == b"done"
    except JailGone:
        pass
    finally:
        await jail.kill()
        await jailer.jails.discard("fuzz")
    return used


@pytest.mark.timeout(180)
@pytest.mark.skipif(_TRINITY is None, reason="trinity is not here: apt-get install trinity")
@pytest.mark.parametrize(
    "seconds", [pytest.param(_SHORT, id="short"), pytest.param(_LONG, id="long", marks=pytest.mark.fuzz)]
)
async def test_random_system_calls_stay_inside(jailer: RunningJailer, tmp_path: Path, seconds: float) -> None:
    neighbour = await jailer.jails.make(spec("neighbour", python(ECHO)))
    await neighbour.start()
    before, used = _host(), 0.0
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    with canaries(tmp_path):
        while (left := end - loop.time()) > 0:
            used += await _fuzz(jailer, left)
        await neighbour.send(b"alive")
        assert await neighbour.receive() == b"alive"
    assert _host() == before
    assert used > seconds / 20, "seconds of processor time: most calls that do not fail wait"
