"""What the daemon does with what it gets of a jail. The jailer here says what a test wants, and its freezers
are plain files, as of cgroup v2."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import pytest

from edge_agent.jail import jailed
from edge_agent.jail.api import Jail, JailGone, JailSpec
from edge_agent.jail.client import JailerClient
from edge_agent.jail.protocol import Ended
from edge_agent.jail.wire import Body, Closed, Wire, close_all, pair
from shared.errors import Reason, RoostError
from shared.resources import Resources
from tests.support.eventually import eventually

SPEC = JailSpec("a", "v1", ("/agent",), {}, Resources(64 << 20, 1000, 8))
KILLED = Ended(-signal.SIGKILL, out_of_memory=False)


class Jailer:
    """Answers all but those requests whose names are in `silent`. `freezer`: how many descriptors of one go
    with a jail."""

    def __init__(self, directory: Path) -> None:
        ours, theirs = pair()
        self.freezer = 2
        self.silent: set[str] = set()
        self.asked: list[Body] = []
        self._wire = Wire(ours)
        self._inits = [pair() for _ in range(2)]
        self._freeze, self._events = directory / "cgroup.freeze", directory / "cgroup.events"
        self._freeze.write_text("0\n")
        self.stops(now=False)
        asyncio.get_running_loop().add_reader(ours, self._hear)
        self.jails = JailerClient(theirs)

    def stops(self, now: bool) -> None:
        """Do the processes of the jail stop when they are frozen?"""
        self._events.write_text(f"populated 1\nfrozen {now:d}\n")

    @property
    def freezes(self) -> bool:
        return self._freeze.read_text().strip() == "1"

    def did(self) -> list[str]:
        return [body["do"] for body in self.asked]

    def tell_end(self) -> None:
        self._wire.send({"event": "exited", "jail_id": "a", **asdict(KILLED)})

    def answer(self, body: Body) -> None:
        ok: Body = {}
        fds: tuple[int, ...] = ()
        match body["do"]:
            case "make" | "attach":
                ok = {"memory_bytes": 64 << 20, "cpu_millis": 1000, "pids": 8, "devices": []}
                freezer = (os.open(self._freeze, os.O_WRONLY), os.open(self._events, os.O_RDONLY), os.dup(2))
                fds = (*(os.dup(ours.fileno()) for ours, _ in self._inits), *freezer[: self.freezer])
                close_all(freezer[self.freezer :])
            case "kill":
                ok = asdict(KILLED)
            case "list" | "directories":
                ok = {"jail_ids": ["a"]}
            case "measure":
                ok = {"memory_bytes": 1, "cpu_seconds": 0.0, "pids": 1, "oom_kills": 0}
        self._wire.send({"id": body["id"], "ok": ok}, fds)

    def _hear(self) -> None:
        try:
            frames = self._wire.receive()
        except Closed:
            asyncio.get_running_loop().remove_reader(self._wire)
            return
        for frame in frames:
            frame.close()
            self.asked.append(frame.body)
            if frame.body["do"] not in self.silent:
                self.answer(frame.body)

    def die(self) -> None:
        if self._wire.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._wire)
            self._wire.close()

    def close(self) -> None:
        self.die()
        self.jails.close()
        for ends in self._inits:
            for end in ends:
                end.close()


@pytest.fixture
async def jailer(tmp_path: Path) -> AsyncIterator[Jailer]:
    """No freezer that it gave is open in the end, however its jail ended."""
    jailer = Jailer(tmp_path)
    yield jailer
    jailer.close()
    await eventually(lambda: not [path for path in _open() if path.startswith(str(tmp_path))], 2.0)


def _open() -> list[str]:
    """What this process has open."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # that of the listing itself
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    return sorted(found)


async def _freezing(jail: Jail, jailer: Jailer) -> asyncio.Task[None]:
    task = asyncio.create_task(jail.freeze())
    await eventually(lambda: jailer.freezes, 2.0)
    assert not task.done()
    return task


async def test_it_is_frozen_without_the_jailer_and_told_when_all_have_stopped(jailer: Jailer) -> None:
    jail = await jailer.jails.make(SPEC)
    freezing = await _freezing(jail, jailer)
    jailer.stops(now=True)
    await freezing
    await jail.freeze()
    await jail.thaw()
    assert not jailer.freezes
    assert jailer.did() == ["make"]
    await jail.kill()


async def test_a_freeze_that_is_cut_off_leaves_it_running(jailer: Jailer) -> None:
    jail = await jailer.jails.make(SPEC)
    freezing = await _freezing(jail, jailer)
    freezing.cancel()
    await asyncio.wait({freezing})
    assert not jailer.freezes
    await jail.kill()


async def test_who_does_not_stop_in_time_runs_on(jailer: Jailer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jailed, "_FREEZE_SECONDS", 0.02)
    jail = await jailer.jails.make(SPEC)
    with pytest.raises(RoostError, match=r"did not stop in 0\.02 s") as caught:
        await jail.freeze()
    assert caught.value.reason is Reason.JAIL_FAILED
    assert "thawed again" in caught.value.hint
    assert not jailer.freezes
    await jail.kill()


async def test_a_jail_that_ends_while_it_is_frozen_is_gone(jailer: Jailer) -> None:
    jail = await jailer.jails.make(SPEC)
    freezing = await _freezing(jail, jailer)
    jailer.tell_end()
    for call in (lambda: freezing, jail.freeze, jail.thaw):
        with pytest.raises(JailGone):
            await call()


async def test_who_has_lost_its_jailer_freezes_nobody(jailer: Jailer) -> None:
    jail = await jailer.jails.make(SPEC)
    freezing = await _freezing(jail, jailer)
    jailer.die()
    for call in (lambda: freezing, jail.freeze, jail.thaw):
        with pytest.raises(RoostError, match="jailer is gone") as caught:
            await call()
        assert caught.value.reason is Reason.JAIL_FAILED


async def test_with_a_guarded_file_it_is_frozen_only_under_a_jailer_that_lives(jailer: Jailer) -> None:
    """A jailer that dies lets those through who wait for the file, to what is not its content."""
    jail = await jailer.jails.make(SPEC)
    jailer.stops(now=True)
    await jail.guard(0, lambda: None)
    await jail.freeze()
    assert jailer.did()[-1] == "measure"
    await jail.thaw()
    jailer.silent.add("measure")
    freezing = await _freezing(jail, jailer)
    jailer.die()
    with pytest.raises(RoostError, match="jailer is gone"):
        await freezing


@pytest.mark.parametrize("freezer", [0, 3])
async def test_a_jailer_of_another_version_is_told_apart(jailer: Jailer, freezer: int) -> None:
    jailer.freezer = freezer
    with pytest.raises(RoostError, match="not of this daemon's version") as caught:
        await jailer.jails.make(SPEC)
    assert caught.value.reason is Reason.JAIL_FAILED
    assert "restart" in caught.value.hint
    await eventually(lambda: jailer.did() == ["make", "kill"], 2.0, "nobody wants it")
    assert await jailer.jails.adopt() == []
    await eventually(lambda: jailer.did()[-1] == "kill", 2.0, "nor one that ran already")


async def test_what_comes_for_nobody_is_closed(jailer: Jailer) -> None:
    jailer.silent.add("make")
    making = asyncio.create_task(jailer.jails.make(SPEC))
    await eventually(lambda: jailer.did() == ["make"], 2.0)
    making.cancel()
    await asyncio.wait({making})
    before = _open()
    jailer.answer(jailer.asked[0])
    await eventually(lambda: jailer.did() == ["make", "kill"], 2.0)
    assert await jailer.jails.directories() == ["a"]  # what was sent before has been read
    assert _open() == before
