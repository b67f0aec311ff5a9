"""The wright forks all that the jailer makes, and may die; shells wait to be jails, and may die, too."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress

import psutil
import pytest

from edge_agent.jail.api import Jail, JailSpec
from shared.errors import RoostError
from shared.resources import Resources
from tests.support.eventually import eventually
from tests.support.jailer import ECHO, RunningJailer, alive, python, spec


async def wright(jailer: RunningJailer) -> int:
    """A new one has its name a moment later."""
    found = await eventually(lambda: jailer.child_named("roost-wright"), 5.0, "a wright")
    return found.pid


async def echoes(jail: Jail) -> bool:
    await jail.send(b"still here")
    return await jail.receive() == b"still here"


@pytest.mark.parametrize("way", ["exec", "zygote"])
async def test_the_wright_is_killed_and_jails_go_on_and_are_made(jailer: RunningJailer, way: str) -> None:
    before = await jailer.started(way, "before", ECHO)
    first = await wright(jailer)
    os.kill(first, signal.SIGKILL)
    await eventually(lambda: not alive(first), 5.0, "it is dead")
    after = await jailer.started("exec", "after", ECHO)
    assert await echoes(before)
    assert await echoes(after)
    assert await wright(jailer) != first


@pytest.mark.parametrize("way", ["exec", "task"])
async def test_what_a_wright_made_before_it_was_killed_is_gone_when_that_is_told(
    jailer: RunningJailer, way: str
) -> None:
    """It may have cloned an init of which the jailer never heard, and which joins the control groups."""
    make = jailer.jails.task if way == "task" else jailer.jails.make
    for delay in range(20):
        making = asyncio.ensure_future(make(spec("a", python(ECHO))))
        await asyncio.sleep(delay / 5000)
        with suppress(ProcessLookupError):
            os.kill(await wright(jailer), signal.SIGKILL)
        try:
            await (await making).kill()
        except RoostError as error:
            assert "wright" in error.message
        assert not jailer.cgroups()
        await eventually(lambda: not jailer.inits(), 5.0, "nor is any process left")


async def test_a_frozen_wright_is_replaced(jailer: RunningJailer) -> None:
    first = await wright(jailer)
    os.kill(first, signal.SIGSTOP)
    with pytest.raises(RoostError, match="there is a new one"):
        await jailer.jails.make(spec("a", python(ECHO)))
    jail = await jailer.jails.make(spec("a", python(ECHO)))
    await jail.start()
    assert await echoes(jail)
    assert not alive(first)


async def test_the_wright_holds_nothing_of_a_jail(jailer: RunningJailer) -> None:
    await jailer.started("exec", "a", ECHO)
    await jailer.started("zygote", "b", ECHO)
    await eventually(lambda: len(jailer.shells()) == 1, 5.0, "it has nothing more to make")
    links = {
        os.readlink(f"/proc/{await wright(jailer)}/fd/{n}")
        for n in os.listdir(f"/proc/{await wright(jailer)}/fd")
    }
    assert len([link for link in links if link.startswith("socket:")]) == 1, links


async def test_what_the_wright_makes_is_the_jailers_child_and_dies_with_it(jailer: RunningJailer) -> None:
    await jailer.started("exec", "a", ECHO)
    pids = [await wright(jailer), *jailer.inits()]
    assert all(psutil.Process(pid).ppid() == jailer.process.pid for pid in pids)
    jailer.signal(signal.SIGKILL)
    await eventually(lambda: not [pid for pid in pids if alive(pid)], 5.0, "all die with it")
    await jailer.process.wait(5.0)
    await jailer.start()


async def test_a_shell_waits_after_a_fork_and_is_used_for_the_next(jailer: RunningJailer) -> None:
    zygote = await jailer.zygote("v2", ECHO)
    await jailer.forked("a", zygote)
    await eventually(lambda: len(jailer.shells()) == 1, 5.0, "a shell waits")
    (shell,) = jailer.shells()
    b = await jailer.forked("b", zygote)
    assert psutil.Process(shell).uids().real != 0, "it is b's init now"
    assert await echoes(b)
    await eventually(lambda: len(jailer.shells()) == 1, 5.0, "another waits")
    await zygote.kill()
    await eventually(lambda: not jailer.shells(), 5.0, "none waits without its zygote")
    assert await echoes(b)


async def test_a_shell_is_killed_and_its_zygote_forks_on(jailer: RunningJailer) -> None:
    zygote = await jailer.zygote("v2", ECHO)
    await jailer.forked("a", zygote)
    await eventually(lambda: len(jailer.shells()) == 1, 5.0, "a shell waits")
    os.kill(jailer.shells()[0], signal.SIGKILL)
    await eventually(lambda: not jailer.shells(), 5.0, "it is gone")
    assert await echoes(await jailer.forked("b", zygote))


async def test_a_shell_does_for_no_other_limits(jailer: RunningJailer) -> None:
    zygote = await jailer.zygote("v2", ECHO)
    await jailer.forked("a", zygote)
    await eventually(lambda: len(jailer.shells()) == 1, 5.0, "a shell waits")
    (shell,) = jailer.shells()
    other = JailSpec("b", "v2", ("/none",), {}, Resources(96 << 20, 1000, 32), zygote.jail_id)
    await (await jailer.jails.make(other)).start()
    await eventually(lambda: not alive(shell), 5.0, "it fits no more")
    await eventually(lambda: len(jailer.shells()) == 1, 5.0, "but one that does")
