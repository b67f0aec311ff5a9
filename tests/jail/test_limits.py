"""What a jail may use, and how it is stopped when it wants more."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from edge_agent.jail.api import Exit, Jail, JailGone
from shared.errors import RoostError
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


GROW = """
import sys
x = bytearray(400 << 20)
for at in range(0, len(x), 4096): x[at] = 1
send(b'it all fits')
"""


@pytest.mark.parametrize("way", ["exec", "zygote"])
async def test_a_forked_agent_that_takes_too_much_is_told_alike(jailer: RunningJailer, way: str) -> None:
    jail = await jailer.started(way, "a", "recv()\n" + GROW)  # it waits, as a parked one does
    await jail.send(b"now")
    exit = await _gone(jail)
    assert (exit.code, exit.out_of_memory) == (-9, True)


async def test_an_agent_that_fails_after_its_child_was_killed_for_memory(jailer: RunningJailer) -> None:
    code = f"""
import os
code = {GROW!r}
if os.fork() == 0:
    exec(code)
    os._exit(0)
_, status = os.wait()
send(str(os.waitstatus_to_exitcode(status)).encode())
recv()
raise SystemExit(5)
"""
    jail = await jailer.jails.make(spec("a", python(code), LIMITS))
    await jail.start()
    async with asyncio.timeout(20.0):
        assert await jail.receive() == b"-9", "the child, not the agent"
    assert (await jail.usage()).oom_kills == 1
    await jail.send(b"go on")
    exit = await _gone(jail)
    assert (exit.code, exit.out_of_memory) == (5, True)


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


async def test_a_jail_grows_and_shrinks_as_it_runs(jailer: RunningJailer) -> None:
    code = """
kept = []
while True:
    word = recv()
    if word == b"more":
        kept.append(bytearray(os.urandom(1 << 20) * 100))
    if word == b"less":
        kept.clear()
    send(b"ok")
"""
    jail = await jailer.jails.make(spec("a", python(code), LIMITS))
    await jail.start()
    await jail.resize(Resources(300 << 20, 2000, 20))
    await jail.send(b"more")
    async with asyncio.timeout(20.0):
        assert await jail.receive() == b"ok", "100 MiB, of which the kernel knows now"
    with pytest.raises(RoostError, match=r"uses 1\d\d.*M of memory, and can't do with 48M") as refused:
        await jail.resize(LIMITS)
    assert refused.value.hint
    assert jail.limits.memory_bytes == 300 << 20
    await jail.send(b"less")
    async with asyncio.timeout(20.0):
        assert await jail.receive() == b"ok", "nothing was killed for it"
    await jail.resize(LIMITS)
    await jail.send(b"more")
    exit = await _gone(jail)
    assert (exit.code, exit.out_of_memory) == (-9, True)


async def test_what_is_only_cached_gives_way(jailer: RunningJailer) -> None:
    code = """
with open("/state/f", "wb") as f:
    for _ in range(100): f.write(bytes(1 << 20))
    os.fsync(f.fileno())
send(b"written")
while True: send(recv())
"""
    jail = await jailer.jails.make(spec("a", python(code), Resources(200 << 20, 2000, 8)))
    await jail.start()
    async with asyncio.timeout(20.0):
        await jail.receive()
    await jail.resize(LIMITS)
    assert (await jail.usage()).memory_bytes <= LIMITS.memory_bytes
    await jail.send(b"alive")
    assert await jail.receive() == b"alive"


async def test_a_restarted_daemon_learns_the_new_limits(jailer: RunningJailer) -> None:
    jail = await jailer.jails.make(spec("a", python("while True: send(recv())"), LIMITS))
    await jail.start()
    bigger = Resources(96 << 20, 700, 9)
    await jail.resize(bigger)
    jailer.jails.close()
    os.kill(jailer.daemon_pid, signal.SIGKILL)
    (adopted,) = await (await jailer.reconnect()).adopt()
    assert adopted.limits == bigger
