"""Whoever opens a file in a jail whose content is not here yet waits, however it goes about it."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from edge_agent.jail.api import Jail
from edge_agent.state.files import Entry, Kind
from shared.errors import Reason, RoostError
from tests.support.eventually import eventually
from tests.support.jailer import ECHO, RunningJailer, python, spec

CONTENT = b"all of it"
# Ways to come to the content of /state/large.
READERS = {
    "open": "open('/state/large', 'rb').read()",
    "open for writing": "(f := open('/state/large', 'r+b')).read()",
    "map": "mmap.mmap(os.open('/state/large', os.O_RDONLY), 0, prot=mmap.PROT_READ)[:]",
    "symlink": "(os.symlink('/state/large', '/state/s'), open('/state/s', 'rb').read())[1]",
    "hard link": "(os.link('/state/large', '/state/h'), open('/state/h', 'rb').read())[1]",
    "rename": "(os.rename('/state/large', '/state/r'), open('/state/r', 'rb').read())[1]",
    "path only": "open('/proc/self/fd/%d' % os.open('/state/large', os.O_PATH), 'rb').read()",
    "child": "subprocess.run(['cat', '/state/large'], capture_output=True).stdout",
    "copy": "(shutil.copyfile('/state/large', '/state/c'), open('/state/c', 'rb').read())[1]",
}
READER = "import mmap, os, shutil, subprocess\nwhile recv(): send(%s)"


@asynccontextmanager
async def guarded(jail: Jail) -> AsyncIterator[tuple[int, asyncio.Event]]:
    """/state/large, with a descriptor to fill it; the event says that somebody opens it."""
    fd = await jail.files.open_write("large")
    os.ftruncate(fd, len(CONTENT))
    opening = asyncio.Event()
    await jail.guard(fd, opening.set)
    await jail.files.commit_write(Entry("large", Kind.FILE, 0o600), more=True)
    yield fd, opening
    os.close(fd)


async def fill(jail: Jail, fd: int) -> None:
    os.write(fd, CONTENT)
    await jail.files.written("large", 0, more=False)
    await jail.release(fd)


@pytest.mark.parametrize("way", ["exec", "zygote"])
@pytest.mark.parametrize("reader", READERS)
async def test_nobody_sees_it_before_it_is_filled(jailer: RunningJailer, way: str, reader: str) -> None:
    jail = await jailer.started(way, "a", READER % READERS[reader])
    async with guarded(jail) as (fd, opening), asyncio.timeout(20):
        await jail.send(b"read")
        await opening.wait()
        answer = asyncio.create_task(jail.receive())
        await asyncio.sleep(0.05)
        assert not answer.done()
        await fill(jail, fd)
        assert await answer == CONTENT


async def test_a_file_of_nobody_or_of_another_is_not_guarded(jailer: RunningJailer, tmp_path: Path) -> None:
    jail = await jailer.jails.make(spec("a", python(ECHO)))
    other = await jailer.jails.make(spec("b", python(ECHO)))
    (tmp_path / "mine").write_text("")
    foreign = [os.open("/etc/passwd", os.O_RDONLY), os.open(tmp_path / "mine", os.O_RDWR)]
    foreign += [await other.files.open_write("theirs"), os.open("/dev/null", os.O_RDONLY), os.pipe()[0]]
    for fd in foreign:
        for ask in (lambda fd: jail.guard(fd, lambda: None), jail.release):
            with pytest.raises(RoostError, match="no file of jail a") as caught:
                await ask(fd)
            assert caught.value.reason is Reason.JAIL_FAILED
        os.close(fd)


async def test_a_jail_with_a_file_that_is_not_filled_ends_with_the_daemon(jailer: RunningJailer) -> None:
    code = READER % READERS["open"]
    jails = [await jailer.started("exec", name, code) for name in ("filled", "unfilled")]
    for jail in jails:
        async with guarded(jail) as (fd, opening), asyncio.timeout(20):
            await jail.send(b"read")
            await opening.wait()
            if jail.jail_id == "filled":
                await fill(jail, fd)
                assert await jail.receive() == CONTENT
    os.kill(jailer.daemon_pid, signal.SIGKILL)
    client = await jailer.reconnect()
    assert [jail.jail_id for jail in await client.adopt()] == ["filled"]
    await eventually(lambda: jailer.members("unfilled") == [], 10)


# Each time a child is killed while it waits for the file.
KILLER = """
import os, signal, time
while number := recv():
    for _ in range(int(number)):
        pid = os.fork()
        if pid == 0:
            open("/state/large", "rb")
            os._exit(0)
        time.sleep(0.0005)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    send(b"done")
"""


async def test_who_is_killed_while_it_waits_costs_the_jailer_little(jailer: RunningJailer) -> None:
    process = psutil.Process(jailer.process.pid)
    jail = await jailer.started("exec", "a", KILLER)
    async with guarded(jail) as (fd, _), asyncio.timeout(60):
        before = process.num_fds()
        await jail.send(b"3000")
        assert await jail.receive() == b"done"
        assert process.num_fds() - before < 1100
        await fill(jail, fd)
        await eventually(lambda: process.num_fds() <= before, 5)


async def test_a_guarded_file_that_loses_its_name_harms_nobody(jailer: RunningJailer) -> None:
    loses = (
        "(os.link('/state/large', '/state/l'), os.unlink('/state/large'), os.unlink('/state/l'), b'ok')[-1]"
    )
    replaces = "(open('/state/new', 'w').write('x'), os.rename('/state/new', '/state/large'), b'ok')[-1]"
    for loss in (loses, replaces):
        jail = await jailer.started("exec", "a", READER % loss)
        async with guarded(jail) as (fd, _), asyncio.timeout(10):
            await jail.send(b"go")
            assert await jail.receive() == b"ok"
            await fill(jail, fd)
            assert not jail.ended
            await jail.kill()
            await jailer.jails.discard("a")


async def test_only_so_many_are_guarded(jailer: RunningJailer) -> None:
    jail = await jailer.jails.make(spec("a", python(ECHO)))
    await _guards_until_refused(jail, 1024, "1024 files of jail a")


async def test_only_so_many_are_guarded_in_all(jailer: RunningJailer) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.prlimit(jailer.process.pid, resource.RLIMIT_NOFILE, (800, hard))
    jails = [await jailer.jails.make(spec(name, python(ECHO))) for name in "ab"]
    async with guarded(jails[0]) as (fd, _):
        await _guards_until_refused(jails[1], 199, "200 files of this node")
        await fill(jails[0], fd)
    await _guards_until_refused(jails[1], 200, "200 files of this node")


async def _guards_until_refused(jail: Jail, most: int, why: str) -> None:
    fds = [await jail.files.open_write(f"large-{n}") for n in range(most + 1)]
    for fd in fds[:-1]:
        await jail.guard(fd, lambda: None)
    with pytest.raises(RoostError, match=why):
        await jail.guard(fds[-1], lambda: None)
    for fd in fds:
        await jail.release(fd)
        os.close(fd)


# So many children wait for the file at a time.
CROWD = """
import os, time
for _ in range(int(recv())):
    if os.fork() == 0:
        open("/state/large", "rb")
        os._exit(0)
send(b"done")
time.sleep(1000)
"""


async def test_the_jail_of_which_most_wait_is_ended_when_there_are_too_many(jailer: RunningJailer) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.prlimit(jailer.process.pid, resource.RLIMIT_NOFILE, (4 * 25, hard))
    few, many = [await jailer.started("exec", name, CROWD) for name in ("few", "many")]
    async with guarded(few) as (fd, opening), guarded(many), asyncio.timeout(20):
        await few.send(b"2")
        await few.receive()
        await opening.wait()
        await many.send(b"25")
        await eventually(lambda: many.ended, 10)
        assert not few.ended
        await fill(few, fd)
    again = await jailer.started("exec", "again", CROWD)
    async with guarded(again) as (fd, opening), asyncio.timeout(20):
        await again.send(b"20")
        await again.receive()
        await opening.wait()
        await fill(again, fd)
        assert not again.ended, "those of the others count no more"


async def test_the_jailer_keeps_no_descriptor_of_what_was_guarded(jailer: RunningJailer) -> None:
    process = psutil.Process(jailer.process.pid)
    counts = []
    for _ in range(4):
        jail = await jailer.started("exec", "a", READER % READERS["open"])
        async with guarded(jail) as (_, opening), asyncio.timeout(20):
            await jail.send(b"read")
            await opening.wait()
            await jail.kill()
        counts.append(process.num_fds())
    await eventually(lambda: process.num_fds() <= counts[0], 5, str(counts))
