"""The process that serves the files of all jails that were forked: what it can do, what one jail can do to
others through it, and what becomes of them when it dies or stands still."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from edge_agent.jail import protocol
from edge_agent.jail.api import Exit, Jail, JailGone
from edge_agent.state.files import Entry, Kind
from edge_agent.state.tree import MAX_ENTRIES
from shared.errors import RoostError
from tests.support.eventually import eventually
from tests.support.jailer import ECHO, FILE_SERVICE, RunningJailer, alive

_MANY = MAX_ENTRIES + 1  # files
_FLOOD = "import os\nwhile True: os.write(2, bytes(1 << 16))"
_OUTPUT_BYTES = 8 << 20  # that are read in a second, at most


async def service(jailer: RunningJailer) -> psutil.Process:
    return await eventually(lambda: jailer.child_named(FILE_SERVICE), 5.0, "a file service")


async def works(jail: Jail) -> bool:
    """Its agent answers, and its files are served."""
    async with asyncio.timeout(10.0):
        await jail.send(b"hello")
        await jail.files.scan()
        return await jail.receive() == b"hello"


async def gone(jail: Jail) -> Exit:
    async with asyncio.timeout(10.0):
        with pytest.raises(JailGone) as caught:
            await jail.receive()
    return caught.value.exit


async def test_it_is_killed_and_the_jails_that_it_served_end(jailer: RunningJailer) -> None:
    zygote = await jailer.zygote("v2", ECHO)
    forked = [await jailer.forked(name, zygote) for name in "abc"]
    executed = await jailer.started("exec", "d", ECHO)
    first = await service(jailer)
    first.kill()
    for jail in forked:
        assert (await gone(jail)).code == -signal.SIGKILL
    assert not first.is_running()
    assert await works(executed)
    assert await works(await jailer.forked("a", zygote))
    assert (await service(jailer)).pid != first.pid


async def test_it_is_killed_while_jails_are_made(jailer: RunningJailer) -> None:
    zygote = await jailer.zygote("v2", ECHO)
    for delay in range(30):
        making = asyncio.ensure_future(jailer.forked("a", zygote))
        await asyncio.sleep(delay / 2000)
        if process := jailer.child_named(FILE_SERVICE):
            process.kill()
        async with asyncio.timeout(10.0):
            with suppress(RoostError, JailGone):
                await (await making).kill()
        await eventually(lambda: _groups(jailer) == {zygote.jail_id}, 5.0, "nothing is left of it")
    assert await works(await jailer.forked("a", zygote))
    await zygote.kill()


async def test_it_stands_still_and_jails_can_be_killed(jailer: RunningJailer) -> None:
    zygote = await jailer.zygote("v2", ECHO)
    a, b = await jailer.forked("a", zygote), await jailer.forked("b", zygote)
    stopped = await service(jailer)
    stopped.suspend()
    async with asyncio.timeout(8.0):
        await a.kill()
    again = await jailer.forked("a", zygote)
    stopped.resume()
    assert await works(b), "it was slow, and nothing is lost"
    assert await works(again), "the end of its predecessor is not taken for its own"


@pytest.mark.timeout(90)
async def test_it_is_killed_if_it_never_goes_on(jailer: RunningJailer) -> None:
    zygote = await jailer.zygote("v2", ECHO)
    a, b = await jailer.forked("a", zygote), await jailer.forked("b", zygote)
    (await service(jailer)).suspend()
    await a.kill()
    async with asyncio.timeout(40.0):
        with pytest.raises(JailGone):
            await b.receive()
    assert await works(await jailer.forked("a", zygote))


async def test_the_jailer_ends_while_it_stands_still(jailer: RunningJailer) -> None:
    zygote = await jailer.zygote("v2", ECHO)
    for name in "abc":
        await jailer.forked(name, zygote)
    (await service(jailer)).suspend()
    jailer.signal(signal.SIGTERM)
    await jailer.process.wait(15.0)


async def test_what_it_can_do(jailer: RunningJailer) -> None:
    await jailer.forked("a", await jailer.zygote("v2", ECHO))
    process = await service(jailer)
    status = dict(line.split(":\t", 1) for line in _lines(process, "status") if ":\t" in line)
    three = 1 << 0 | 1 << 1 | 1 << 3  # chown, dac_override, fowner
    assert [int(status[name], 16) for name in ("CapPrm", "CapEff")] == [three, three]
    assert {int(status[name], 16) for name in ("CapInh", "CapBnd", "CapAmb")} == {0}
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert os.listdir(f"/proc/{process.pid}/root") == []
    assert len(_lines(process, "mountinfo")) == 1
    for name in ("mnt", "pid", "net", "ipc", "uts"):
        link = os.readlink(f"/proc/{process.pid}/ns/{name}")
        assert link != os.readlink(f"/proc/{jailer.process.pid}/ns/{name}"), name
    soft, hard = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
    assert soft == hard


async def test_it_dies_with_the_jailer(jailer: RunningJailer) -> None:
    await jailer.forked("a", await jailer.zygote("v2", ECHO))
    process = await service(jailer)
    jailer.signal(signal.SIGKILL)
    await eventually(lambda: not alive(process.pid), 5.0, "it dies with it")
    await eventually(lambda: not jailer.forked_only() and not jailer.jailed(), 10.0, "and all others")
    await jailer.process.wait(5.0)
    await jailer.start()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", ["large", ".roost-tmp-large"])
async def test_a_large_tree_holds_up_nobody_else(jailer: RunningJailer, name: str) -> None:
    """Neither as it is looked through, nor as it is removed, which the next scan does with what has a name of
    ours."""
    zygote = await jailer.zygote("v2", ECHO)
    large, small = await jailer.forked("large", zygote), await jailer.forked("small", zygote)
    directory = jailer.data_dir / "jails/large/state" / name
    directory.mkdir()
    for i in range(_MANY):
        os.mknod(directory / f"file-{i:06}")
    scanning, began = asyncio.create_task(large.files.scan()), time.monotonic()
    took: list[float] = []
    while not scanning.done():
        start = time.monotonic()
        assert await small.files.scan() == []
        took.append(time.monotonic() - start)
    if name == "large":
        with pytest.raises(RoostError, match="too large"):
            await scanning
    else:
        assert await scanning == []
    assert len(took) > 5
    assert max(took) < (time.monotonic() - began) / 2


async def test_files_of_a_size_are_written_back_aside(jailer: RunningJailer) -> None:
    code = "open('/state/f', 'wb').write(bytes(8 << 20)); send(b'.')\nwhile True: recv()"
    jail = await jailer.started("zygote", "a", code)
    await jail.receive()
    for _ in range(20):
        entries, opened = await jail.files.changed(0)
        assert ([entry.path for entry in entries], list(opened)) == (["f"], ["f"])
        assert os.fstat(opened["f"]).st_size == 8 << 20
        os.close(opened["f"])


async def test_who_floods_its_output_holds_up_nobody_else(jailer: RunningJailer) -> None:
    other = await jailer.started("zygote", "b", ECHO)
    process = await service(jailer)
    flooding = await jailer.started("zygote", "a", _FLOOD)
    read, began = _bytes_read(process), time.monotonic()
    while time.monotonic() < began + 3.0:
        assert await works(other)
    read = _bytes_read(process) - read
    assert _OUTPUT_BYTES < read < _OUTPUT_BYTES * (time.monotonic() - began + 2)
    assert not flooding.ended


async def test_the_last_words_of_who_printed_too_much(jailer: RunningJailer) -> None:
    code = (
        "import os\nfor _ in range(160): os.write(2, bytes(1 << 16))\nos.write(2, b'farewell')\nos._exit(7)"
    )
    exit = await gone(await jailer.started("zygote", "a", code))
    assert (exit.code, exit.stderr_tail[-8:]) == (7, "farewell")


async def test_with_many_open_files_jails_end_as_ever(jailer: RunningJailer) -> None:
    """Each file that is still to come is one, and each jail three."""
    zygote = await jailer.zygote("v2", ECHO)
    a, b = await jailer.forked("a", zygote), await jailer.forked("b", zygote)
    for i in range(1030):
        os.close(await a.files.open_write(f"f{i}"))
        await a.files.commit_write(Entry(f"f{i}", Kind.FILE, 0o600), more=True)
    c = await jailer.forked("c", zygote)
    for jail in (b, c):
        await jail.kill()
    assert await works(a)


async def test_an_agent_that_takes_the_place_of_what_is_being_written(jailer: RunningJailer) -> None:
    code = """
import os
recv()
for name in os.listdir("/state"):
    os.unlink("/state/" + name)
    os.mkdir("/state/" + name)
os._exit(0)
"""
    zygote = await jailer.zygote("v2", ECHO)
    other = await jailer.forked("b", zygote)
    hostile = await jailer.started("zygote", "a", code)
    os.close(await hostile.files.open_write("x"))
    await hostile.send(b"go")
    assert (await gone(hostile)).code == 0
    assert await works(other)


async def test_a_service_that_can_open_no_more_gives_up_who_came_last(jailer: RunningJailer) -> None:
    zygote = await jailer.zygote("v2", ECHO)
    first = await jailer.forked("first", zygote)
    pid = (await service(jailer)).pid
    _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    most = max(map(int, os.listdir(f"/proc/{pid}/fd"))) + 3
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (most, hard))
    for name in "abcd":
        with suppress(RoostError, JailGone, TimeoutError):
            await jailer.forked(name, zygote)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (hard, hard))
    assert await works(first)
    assert (await service(jailer)).pid == pid
    await eventually(lambda: _groups(jailer) >= {zygote.jail_id, "first"}, 5.0, "they live")
    assert await works(await jailer.forked("later", zygote))


async def test_a_new_daemon_reaches_the_files_of_jails_that_it_adopts(jailer: RunningJailer) -> None:
    zygote = await jailer.zygote("v2", ECHO)
    for name in "ab":
        jail = await jailer.forked(name, zygote)
        os.close(await jail.files.open_write("of-" + name))
        await jail.files.commit_write(Entry("of-" + name, Kind.FILE, 0o600))
        os.close(await jail.files.open_write("unfinished"))
    os.kill(jailer.daemon_pid, signal.SIGKILL)
    jails = await jailer.reconnect()
    adopted = await jails.adopt()
    assert sorted(jail.jail_id for jail in adopted) == ["a", "b"]
    for jail in adopted:
        assert [entry.path for entry in await jail.files.scan()] == ["of-" + jail.jail_id]
        assert await works(jail)
        exit = await jail.kill()
        assert exit.code == -signal.SIGKILL


async def test_a_jailer_that_can_open_no_more_refuses_and_keeps_nothing(jailer: RunningJailer) -> None:
    """Wherever in the making that happens."""
    zygote = await jailer.zygote("v2", ECHO)
    assert await works(await jailer.forked("kept", zygote))
    await zygote.kill()
    await eventually(lambda: not jailer.shells(), 5.0, "no shell is left")
    before = _descriptors(jailer)
    zygote = await jailer.zygote("v2", ECHO)
    pid = jailer.process.pid
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    made = 0
    for more in range(40):
        few = max(map(int, _descriptors(jailer))) + more - 5
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (few, limits[1]))
        with suppress(RoostError):
            await jailer.forked("a", zygote)
            made += 1
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
        with suppress(RoostError):  # there is none
            await jailer.jails.ask(protocol.Kill("a"), 5.0)
        await eventually(lambda: _groups(jailer) == {zygote.jail_id, "kept"}, 5.0, "nothing is left of it")
    assert 0 < made < 40
    jail = await jailer.forked("a", zygote)
    assert await works(jail)
    await jail.kill()
    await zygote.kill()
    await eventually(lambda: not jailer.shells(), 5.0, "no shell is left")
    await eventually(lambda: _descriptors(jailer) == before, 5.0, f"as at first: {before}")


def _descriptors(jailer: RunningJailer) -> list[str]:
    return sorted(os.listdir(f"/proc/{jailer.process.pid}/fd"), key=int)


def _groups(jailer: RunningJailer) -> set[str]:
    return {path.name for path in jailer.cgroups()}


def _bytes_read(process: psutil.Process) -> int:
    return int(dict(line.split(": ") for line in _lines(process, "io"))["rchar"])


def _lines(process: psutil.Process, name: str) -> list[str]:
    return Path(f"/proc/{process.pid}/{name}").read_text().splitlines()
