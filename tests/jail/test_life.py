"""Deaths: of an agent, of the daemon, of the jailer. What must live on does, and nothing else."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from edge_agent.jail.api import JailGone
from shared.errors import RoostError
from tests.support.eventually import eventually
from tests.support.jailer import (
    ECHO,
    RunningJailer,
    alive,
    needs_root,
    python,
    running_jailer,
    spec,
)

_SAY_LIMITS = "send('{} {}'.format(*resource.getrlimit(resource.RLIMIT_NOFILE)).encode())\n" + ECHO


async def test_kill_leaves_no_process_cgroup_or_namespace(jailer: RunningJailer) -> None:
    code = "import os, time\nif os.fork() == 0:\n    os.setsid(); time.sleep(1000)\nsend(b'.')\n" + ECHO
    jail = await jailer.jails.make(spec("a", python(code)))
    await jail.start()
    await jail.receive()
    pids = set(jailer.jailed())
    assert len(pids) == 3
    namespaces = {os.readlink(f"/proc/{pid}/ns/net") for pid in pids}
    assert len(namespaces) == 1
    await jail.kill()
    assert not [pid for pid in pids if alive(pid)]
    assert not jailer.cgroups()
    open_fds = await _open_fds(jailer)
    for i in range(5):
        await (await jailer.jails.make(spec(f"b{i}", python(ECHO)))).kill()
    assert await _open_fds(jailer) == open_fds, "the jailer keeps no descriptor of a jail that ended"


@needs_root
async def test_a_node_may_have_many_descriptors_and_an_agent_as_many_as_usual() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 1000), hard))  # the usual soft limit is 1,024
    try:
        async with running_jailer() as jailer:
            jail = await jailer.jails.make(spec("a", python("import resource; recv()\n" + _SAY_LIMITS)))
            await jail.start()
            await jail.send(b"?")
            assert await jail.receive() == b"1024 1024"
            for pid in (jailer.process.pid, jailer.daemon_pid):
                (line,) = (li for li in _limits(pid) if li.startswith("Max open files"))
                assert line.split()[3:5] == [str(min(hard, 1 << 16)), str(hard)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _limits(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/limits").read_text().splitlines()


async def _open_fds(jailer: RunningJailer) -> int:
    return len(os.listdir(f"/proc/{jailer.process.pid}/fd"))


async def test_a_jail_lives_on_when_the_daemon_is_killed_and_is_adopted(jailer: RunningJailer) -> None:
    code = (
        "n = 0\nwhile True:\n    recv(); n += 1; open('/state/n', 'w').write(str(n)); send(str(n).encode())"
    )
    jail = await jailer.jails.make(spec("a", python(code)))
    parked = await jailer.jails.make(spec("parked", python(code)))
    await jail.start()
    await jail.send(b".")
    assert await jail.receive() == b"1"
    old, before = jailer.jails, set(jailer.jailed())
    os.kill(jailer.daemon_pid, signal.SIGKILL)
    async with asyncio.timeout(5.0):
        await old.closed()
    with pytest.raises(RoostError, match="jailer is gone"):
        await jail.freeze()
    jails = await jailer.reconnect()
    adopted = {j.jail_id: j for j in await jails.adopt()}
    assert set(adopted) == {"a", "parked"}
    assert set(jailer.jailed()) == before, "the very same processes"
    assert await jails.adopt() == [], "once"
    await adopted["a"].send(b".")
    assert await adopted["a"].receive() == b"2"
    assert [e.path for e in await adopted["a"].files.scan()] == ["n"]
    await adopted["parked"].start()
    await adopted["parked"].send(b".")
    assert await adopted["parked"].receive() == b"1"
    await adopted["a"].kill()
    assert parked.jail_id == "parked"


async def test_a_jail_that_was_left_in_the_midst_of_a_message_is_not_adopted(jailer: RunningJailer) -> None:
    jail = await jailer.jails.make(spec("a", python("import time\ntime.sleep(1000)")))
    await jail.start()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await jail.send(bytes(4 << 20))  # more than the socket holds, and nobody reads
    os.kill(jailer.daemon_pid, signal.SIGKILL)
    jails = await jailer.reconnect()
    assert await jails.adopt() == []
    await eventually(lambda: not jailer.cgroups(), 5.0, "it is gone")


async def test_what_a_daemon_asked_for_is_not_answered_to_the_next(jailer: RunningJailer) -> None:
    """Both count their requests from 1: the next would take it for its own, descriptors and all."""
    await (await jailer.jails.make(spec("large", python(ECHO)))).kill()
    for i in range(10_000):
        (jailer.data_dir / "jails/large/state" / str(i)).touch()
    os.kill(jailer.daemon_pid, signal.SIGKILL)
    old = await jailer.reconnect()
    discard = asyncio.create_task(old.discard("large"))  # its first request
    removing = await eventually(lambda: jailer.child_named("rm"), 5.0, "rm at work")
    removing.suspend()
    os.kill(jailer.daemon_pid, signal.SIGKILL)
    await jailer.reconnect()
    await asyncio.gather(discard, return_exceptions=True)
    slow = asyncio.create_task(jailer.zygote("slow", ECHO, "import time; time.sleep(3)"))
    await asyncio.sleep(0.1)  # it has asked, for the first time
    removing.resume()
    zygote = await slow
    assert not jailer.child_named("rm"), "the answer to the first daemon's came meanwhile"
    jail = await jailer.forked("a", zygote)
    await jail.send(b"mine")
    assert await jail.receive() == b"mine"


async def test_a_jail_that_nobody_waits_for_any_more_is_not_made(jailer: RunningJailer) -> None:
    """The next daemon would not adopt it, since it was not there yet, and nobody would end it."""
    making = asyncio.create_task(jailer.jails.make(spec("a", python(ECHO))))
    while not (inits := jailer.inits()):  # noqa: ASYNC110
        await asyncio.sleep(0)  # not for long: it is made in a few ms
    psutil.Process(inits[0]).suspend()
    await asyncio.wait({making}, timeout=0.2)
    assert not making.done()
    os.kill(jailer.daemon_pid, signal.SIGKILL)
    jails = await jailer.reconnect()
    with suppress(psutil.NoSuchProcess):
        psutil.Process(inits[0]).resume()
    await asyncio.gather(making, return_exceptions=True)
    await eventually(lambda: not jailer.cgroups(), 5.0, "nothing of it is left")
    assert await jails.adopt() == []
    again = await jails.make(spec("a", python(ECHO)))
    await again.kill()


async def test_an_end_while_there_is_no_daemon_is_seen_by_the_next(jailer: RunningJailer) -> None:
    jail = await jailer.jails.make(spec("a", python(ECHO)))
    await jail.start()
    os.kill(jailer.daemon_pid, signal.SIGKILL)
    for pid in jailer.jailed():
        with suppress(ProcessLookupError):  # ended with the one before it
            os.kill(pid, signal.SIGKILL)
    jails = await jailer.reconnect()
    await eventually(lambda: not jailer.cgroups(), 5.0, "it is gone")
    assert await jails.adopt() == []
    assert await jails.directories() == ["a"]


async def test_init_killed_from_outside_ends_the_jail(jailer: RunningJailer) -> None:
    jail = await jailer.jails.make(spec("a", python(ECHO)))
    await jail.start()
    (init,) = jailer.inits()
    os.kill(init, signal.SIGKILL)
    async with asyncio.timeout(5.0):
        with pytest.raises(JailGone) as caught:
            await jail.receive()
    assert (caught.value.exit.code, caught.value.exit.out_of_memory) == (-9, False)


async def test_hangup_restarts_the_daemon_alone(jailer: RunningJailer) -> None:
    jail = await jailer.jails.make(spec("a", python(ECHO)))
    await jail.start()
    old = jailer.daemon_pid
    jailer.signal(signal.SIGHUP)
    jails = await jailer.reconnect()
    assert jailer.daemon_pid != old
    (adopted,) = await jails.adopt()
    await adopted.send(b"still here")
    assert await adopted.receive() == b"still here"
    assert "ended with signal" not in jailer.log()


async def test_a_stop_ends_everything_and_leaves_the_state(jailer: RunningJailer) -> None:
    jail = await jailer.jails.make(spec("a", python("open('/state/kept', 'w')\n" + ECHO)))
    await jail.start()
    await jail.send(b".")
    await jail.receive()
    await jail.freeze()
    pids = [*jailer.jailed(), jailer.daemon_pid]
    assert await jailer.process.stop() == 0
    assert not [pid for pid in pids if alive(pid)]
    assert not jailer.cgroups()
    assert (jailer.data_dir / "jails/a/state/kept").exists()


async def test_when_the_jailer_is_killed_everything_dies_and_the_next_one_sweeps(
    jailer: RunningJailer,
) -> None:
    running = await jailer.jails.make(spec("running", python("open('/state/kept', 'w')\n" + ECHO)))
    await running.start()
    await running.send(b".")
    await running.receive()
    inits = jailer.inits()
    frozen = await jailer.jails.make(spec("frozen", python(ECHO)))
    await frozen.start()
    await frozen.freeze()
    await jailer.jails.make(spec("parked", python(ECHO)))
    owner = (jailer.data_dir / "jails/running/state").stat().st_uid
    pids = [*jailer.jailed(), jailer.daemon_pid]
    jailer.signal(signal.SIGKILL)
    async with asyncio.timeout(5.0):
        await jailer.jails.closed()
    await eventually(lambda: not alive(jailer.daemon_pid), 5.0, "the daemon died with it")
    await eventually(lambda: not [p for p in inits if alive(p)], 5.0, "the jail died with it")
    await jailer.process.wait(5.0)
    assert jailer.cgroups(), "nobody was left to remove them"

    await jailer.start()
    assert not [pid for pid in pids if alive(pid)], "even the frozen ones"
    assert not jailer.cgroups()
    assert await jailer.jails.adopt() == []
    assert await jailer.jails.directories() == ["frozen", "parked", "running"]
    again = await jailer.jails.make(spec("running", python(ECHO)))
    assert [e.path for e in await again.files.scan()] == ["kept"]
    assert (jailer.data_dir / "jails/running/state").stat().st_uid == owner


@pytest.mark.parametrize("after", [0.0, 0.002, 0.006, 0.01, 0.015, 0.02, 0.03])
async def test_no_init_survives_a_jailer_that_dies_while_it_makes_jails(
    jailer: RunningJailer, after: float
) -> None:
    making = [asyncio.create_task(jailer.jails.make(spec(f"jail-{i}", python(ECHO)))) for i in range(4)]
    await asyncio.sleep(after)
    jailer.signal(signal.SIGKILL)
    await asyncio.gather(*making, return_exceptions=True)
    await eventually(lambda: not jailer.forked_only(), 5.0, "all are gone")
    await jailer.process.wait(5.0)
    await jailer.start()
    assert not jailer.cgroups()
    assert await jailer.jails.adopt() == []
    again = await jailer.jails.make(spec("jail-3", python(ECHO)))
    await again.start()
    await again.send(b"still")
    assert await again.receive() == b"still"


async def test_many_are_made_at_once(jailer: RunningJailer) -> None:
    specs = [spec(f"jail-{i}", python(ECHO)) for i in range(12)]
    jails = await asyncio.gather(*(jailer.jails.make(s) for s in specs))
    await asyncio.gather(*(jail.start() for jail in jails))
    for jail in jails:
        await jail.send(jail.jail_id.encode())
    assert [await jail.receive() for jail in jails] == [s.jail_id.encode() for s in specs]
    exits = await asyncio.gather(*(jail.kill() for jail in jails))
    assert {exit.code for exit in exits} == {-9}
    assert not jailer.cgroups()


async def test_two_jailers_on_one_directory_are_refused(jailer: RunningJailer) -> None:
    other = type(jailer)(jailer.data_dir.parent)
    await other.process.start()
    await other.process.wait(20.0)
    assert "another node runs" in other.log()
    await other.close()
    assert await jailer.jails.directories() == []
