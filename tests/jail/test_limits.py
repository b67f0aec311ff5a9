"""What a jail may use, and how it is stopped when it wants more."""

from __future__ import annotations

import asyncio

import pytest

from edge_agent.jail.api import Exit, Jail, JailGone
from shared.resources import Resources
from tests.support.eventually import eventually
from tests.support.jailer import RunningJailer, python, spec

LIMITS = Resources(memory_bytes=48 << 20, cpu_millis=500, pids=8)


async def _gone(jail: Jail, timeout: float = 20.0) -> Exit:
    async with asyncio.timeout(timeout):
        with pytest.raises(JailGone) as caught:
            await jail.receive()
    return caught.value.exit


async def test_an_agent_that_takes_too_much_memory_is_killed_and_that_is_told(jailer: RunningJailer) -> None:
    code = "import sys; print('about to grow', file=sys.stderr, flush=True)\nx = bytearray(256 << 20)"
    jail = await jailer.jails.make(spec("a", python(code), LIMITS))
    await jail.start()
    exit = await _gone(jail)
    assert (exit.code, exit.out_of_memory) == (-9, True)
    assert exit.stderr_tail in ("about to grow\n", "")  # nothing, if the kernel chose init


async def test_files_in_tmp_count_as_memory(jailer: RunningJailer) -> None:
    code = """
try:
    with open('/tmp/big', 'wb') as f:
        for _ in range(256): f.write(bytes(1 << 20))
except OSError as e: send(str(e.errno).encode())
while True: recv()
"""
    jail = await jailer.jails.make(spec("a", python(code), LIMITS))
    await jail.start()
    async with asyncio.timeout(10.0):
        assert await jail.receive() == b"28", "no space left, at half of the memory"
    assert (await jail.usage()).memory_bytes <= LIMITS.memory_bytes


async def test_a_death_of_its_own_is_not_called_out_of_memory(jailer: RunningJailer) -> None:
    jail = await jailer.jails.make(spec("a", python("import os, signal; os.kill(os.getpid(), 9)"), LIMITS))
    await jail.start()
    assert await _gone(jail) == Exit(-9, out_of_memory=False)


async def test_a_fork_bomb_stops_at_the_limit_and_dies_with_its_agent(jailer: RunningJailer) -> None:
    code = """
import os, time
count = 0
while True:
    try:
        if os.fork() == 0: time.sleep(1000)
        count += 1
    except OSError as e:
        send(f"{count} {e.errno}".encode())
        break
while True: recv()
"""
    jail = await jailer.jails.make(spec("a", python(code), LIMITS))
    await jail.start()
    async with asyncio.timeout(10.0):
        assert await jail.receive() == b"7 11", "all but the agent itself; then EAGAIN"
    assert (await jail.usage()).pids == 9, "with init"
    await jail.freeze()
    assert (await jail.kill()).code == -9
    assert not jailer.cgroups()


async def test_the_processor_share_holds(jailer: RunningJailer) -> None:
    jail = await jailer.jails.make(spec("a", python("send(b'.')\nwhile True: pass"), LIMITS))
    await jail.start()
    await jail.receive()
    loop = asyncio.get_running_loop()
    before, began = (await jail.usage()).cpu_seconds, loop.time()
    await asyncio.sleep(1.0)
    used = (await jail.usage()).cpu_seconds - before
    assert used / (loop.time() - began) < 0.75, "half a core was granted"


async def test_freezing_really_stops(jailer: RunningJailer) -> None:
    code = """
i = 0
while True:
    i += 1
    with open('/state/counter', 'r+' if i > 1 else 'w') as f: f.write(str(i))
"""
    jail = await jailer.jails.make(spec("a", python(code), LIMITS))
    await jail.start()
    counter = jailer.data_dir / "jails/a/state/counter"
    await eventually(lambda: counter.exists() and counter.read_text(), 5.0, "it counts")
    await jail.freeze()
    (entry,) = await jail.files.scan()
    stopped_at = counter.read_text()
    await asyncio.sleep(0.2)
    assert counter.read_text() == stopped_at
    assert await jail.files.scan() == [entry]
    await jail.thaw()
    await eventually(lambda: counter.read_text() != stopped_at, 5.0, "it counts again")


async def test_the_last_of_what_it_wrote_is_kept_and_the_log_is_not_flooded(jailer: RunningJailer) -> None:
    code = """
import sys
for i in range(20_000): print("\\x1b[31mline", i, file=sys.stderr)
sys.exit(4)
"""
    jail = await jailer.jails.make(spec("chatty", python(code), LIMITS))
    await jail.start()
    exit = await _gone(jail)
    assert exit.code == 4
    assert exit.stderr_tail.endswith("line 19999\n")
    assert 4000 < len(exit.stderr_tail) <= 4096
    log = jailer.log()
    assert "[chatty] ·[31mline 0\n" in log
    assert "\x1b" not in log
    assert len(log) < 200_000


async def test_orphans_are_reaped(jailer: RunningJailer) -> None:
    code = """
import os, time
for _ in range(50):
    if os.fork() == 0:
        if os.fork() == 0: os._exit(0)
        os._exit(0)
    os.wait()
time.sleep(0.2)
send(b'done')
while True: recv()
"""
    jail = await jailer.jails.make(spec("a", python(code), LIMITS))
    await jail.start()
    async with asyncio.timeout(10.0):
        assert await jail.receive() == b"done"
    assert (await jail.usage()).pids == 2
