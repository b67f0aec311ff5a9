"""The daemon freezes jails by itself, with what the jailer has opened for it."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

from edge_agent.freezer import Freezer
from edge_agent.jail import cgroups
from edge_agent.jail.cgroups.freezing import Freezing
from edge_agent.jail.client import JailerClient
from shared.errors import Reason, RoostError
from tests.support.eventually import eventually
from tests.support.jailer import ECHO, RunningJailer, python, spec

NOBODY = 65534
# As many processes as a jail may have, which all run.
BUSY = """
import os
for _ in range(15):
    if os.fork() == 0: break
else:
    send(b"busy")
while True: pass
"""


@contextmanager
def opened(jailer: RunningJailer, jail_id: str) -> Iterator[Freezing]:
    """What the jailer gives to the daemon with this jail."""
    freezing = Freezing(cgroups.detect(jailer.data_dir).open_freezer(jail_id))
    yield freezing
    freezing.close()


def as_nobody(act: Callable[[], bool]) -> bool:
    """What `act` says in a process without any rights."""
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            os._exit(0 if act() else 1)
        finally:
            os._exit(2)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, 1)
    return code == 0


def comes_to_stand_still(freezing: Freezing) -> bool:
    deadline = time.monotonic() + 5.0
    stopped = freezing.freeze()
    while not stopped and time.monotonic() < deadline:
        time.sleep(0.002)
        stopped = freezing.frozen()
    return stopped


async def test_a_process_without_rights_freezes_with_what_the_jailer_opened(jailer: RunningJailer) -> None:
    jail = await jailer.started("exec", "a", ECHO)
    with opened(jailer, "a") as freezing:
        assert as_nobody(lambda: comes_to_stand_still(freezing))
        await jail.send(b"now")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await jail.receive()
        as_nobody(lambda: freezing.thaw() is None)
        async with asyncio.timeout(5.0):
            assert await jail.receive() == b"now"

    def opens_it_itself() -> bool:
        with suppress(PermissionError):
            cgroups.detect(jailer.data_dir).open_freezer("a")
            return True
        return False

    assert not as_nobody(opens_it_itself)


@pytest.mark.parametrize("way", ["exec", "zygote"])
async def test_what_a_daemon_that_died_had_frozen_is_thawed_by_the_next(
    jailer: RunningJailer, way: str
) -> None:
    jail = await jailer.started(way, "a", ECHO)
    await jail.freeze()
    os.kill(jailer.daemon_pid, signal.SIGKILL)
    (adopted,) = await (await jailer.reconnect()).adopt()
    freezer = Freezer()
    freezer.adopt(adopted)
    await freezer.drop("tenure")
    await adopted.send(b"still here")
    async with asyncio.timeout(5.0):
        assert await adopted.receive() == b"still here"


async def test_one_that_is_frozen_again_and_again_while_it_is_killed_dies(jailer: RunningJailer) -> None:
    """On cgroup v1 what is frozen does not die before it is thawed."""
    jail = await jailer.started("exec", "a", BUSY)
    await jail.receive()
    over = threading.Event()

    def freeze_on(freezing: Freezing) -> None:
        with suppress(OSError):  # it is gone
            while not over.is_set():
                freezing.freeze()

    with opened(jailer, "a") as freezing:
        freezes = threading.Thread(target=freeze_on, args=(freezing,))
        freezes.start()
        killing = asyncio.create_task(jail.kill())
        await asyncio.wait({killing}, timeout=0.2)
        over.set()
        freezes.join()
        async with asyncio.timeout(5.0):
            assert (await killing).code == -9
    assert not jailer.cgroups()


# --- a jailer that has no descriptor left ------------------------------------------------------------


@contextmanager
def with_free(jailer: RunningJailer, number: int) -> Iterator[None]:
    """So many descriptors can it open, and no more."""
    pid = jailer.process.pid
    taken = _open_fds(jailer)
    free = [fd for fd in range(len(taken) + number + 1) if fd not in taken]
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (free[number], before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


def _open_fds(jailer: RunningJailer) -> set[int]:
    return set(map(int, os.listdir(f"/proc/{jailer.process.pid}/fd")))


async def _nothing_is_left(jailer: RunningJailer, fds: int) -> None:
    """Some of it goes a moment after the answer."""
    await eventually(lambda: len(_open_fds(jailer)) == fds and not jailer.cgroups(), 5.0)


async def test_a_jail_for_which_it_has_no_descriptors_is_refused_and_nothing_leaks(
    jailer: RunningJailer,
) -> None:
    await (await jailer.jails.make(spec("first", python(ECHO)))).kill()
    before = len(_open_fds(jailer))
    refusals = []
    for free in range(40):
        try:
            with with_free(jailer, free):
                jail = await jailer.jails.make(spec("a", python(ECHO)))
                break
        except RoostError as error:
            assert error.reason is Reason.JAIL_FAILED
            refusals.append(error.message)
        await _nothing_is_left(jailer, before)
    assert [message for message in refusals if "can't be handed over" in message], refusals
    await jail.start()
    await jail.send(b"unharmed")
    assert await jail.receive() == b"unharmed"
    await jail.kill()
    await _nothing_is_left(jailer, before)


async def test_a_jail_that_can_not_be_adopted_is_ended_and_nothing_leaks(jailer: RunningJailer) -> None:
    before = len(_open_fds(jailer))
    for refused in range(10):
        await jailer.started("exec", "a", ECHO)
        _forget_all(jailer)
        with with_free(jailer, refused):
            adopted = await jailer.jails.adopt()
        if adopted:
            break
        await _nothing_is_left(jailer, before)
    assert refused >= 2
    (jail,) = adopted
    await jail.send(b"unharmed")
    assert await jail.receive() == b"unharmed"
    await jail.kill()
    await _nothing_is_left(jailer, before)


def _forget_all(jailer: RunningJailer) -> None:
    """As a new daemon knows nothing."""
    again = socket.socket(fileno=os.dup(jailer.jailer_socket.fileno()))
    jailer.jails.close()
    jailer.jailer_socket, jailer.jails = again, JailerClient(again)


async def test_a_jail_dies_without_a_descriptor_to_spare(jailer: RunningJailer) -> None:
    before = len(_open_fds(jailer))
    jail = await jailer.started("exec", "a", ECHO)
    with with_free(jailer, 0):
        assert (await jail.kill()).code == -9
    await _nothing_is_left(jailer, before)
