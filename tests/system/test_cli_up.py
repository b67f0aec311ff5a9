"""Starting, watching and stopping processes as `roost up` does, with shell scripts in place of daemons."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from roost.up import record
from roost.up.layout import Process
from roost.up.processes import started_at, stop
from roost.up.record import ProcessRecord, Record
from roost.up.running import only_one, running, take_down
from roost.up.supervisor import Supervisor
from shared.errors import RoostError
from tests.support.eventually import eventually

OBEDIENT = "trap 'echo stopped; exit 0' TERM; echo up; touch $READY; while :; do sleep 0.05; done"
STUBBORN = "trap '' TERM; touch $READY; while :; do sleep 0.05; done"
FAMILY = "sleep 300 & echo $! > $READY; trap 'exit 0' TERM; wait"


class Stubs:
    """Stub processes in a directory, and what their supervisor reported."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.reports: list[str] = []
        self.supervisors: list[Supervisor] = []

    def process(self, name: str, stage: int, script: str) -> Process:
        return Process(
            name,
            stage,
            ("bash", "-c", script),
            "127.0.0.1:1",
            self.directory / f"{name}.log",
            files={self.directory / "config" / name: "text"},
            env={"READY": str(self.ready(name))},
        )

    def ready(self, name: str) -> Path:
        return self.directory / f"{name}.ready"

    async def serves(self, process: Process) -> bool:
        return self.ready(process.name).exists()

    def supervisor(
        self, *processes: Process, start_timeout: float = 10, stop_timeout: float = 5
    ) -> Supervisor:
        made = Supervisor(processes, self.serves, self.reports.append, start_timeout, stop_timeout)
        self.supervisors.append(made)
        return made


@pytest.fixture
async def stubs(tmp_path: Path) -> AsyncIterator[Stubs]:
    stubs = Stubs(tmp_path)
    yield stubs
    for supervisor in stubs.supervisors:
        await supervisor.stop()
        assert not [p for p in supervisor.records() if alive(p.pid)]


def alive(pid: int) -> bool:
    return started_at(pid) is not None


async def test_stages_start_in_order_and_stop_in_reverse(stubs: Stubs) -> None:
    order = stubs.directory / "order"
    script = f"echo start $NAME >> {order}; trap 'echo stop $NAME >> {order}; exit 0' TERM;"
    script += "touch $READY; while :; do sleep 0.02; done"
    supervisor = stubs.supervisor(
        stubs.process("c", 2, "NAME=c; " + script),
        stubs.process("a", 0, "NAME=a; " + script),
        stubs.process("b", 1, "NAME=b; " + script),
    )
    await supervisor.start()
    assert [p.name for p in supervisor.records()] == ["a", "b", "c"]
    await supervisor.stop()
    assert order.read_text().split("\n")[:-1] == [
        "start a",
        "start b",
        "start c",
        "stop c",
        "stop b",
        "stop a",
    ]
    assert not stubs.reports
    assert (stubs.directory / "config" / "a").read_text() == "text"


async def test_one_that_ends_at_its_start_is_told_with_its_log(stubs: Stubs) -> None:
    supervisor = stubs.supervisor(
        stubs.process("fine", 0, OBEDIENT),
        stubs.process("broken", 1, "echo no such file: edge.toml; exit 3"),
    )
    with pytest.raises(RoostError) as caught:
        await supervisor.start()
    assert caught.value.message == "broken ended with exit code 3"
    assert "no such file: edge.toml" in caught.value.hint


async def test_one_that_never_serves_is_given_up(stubs: Stubs) -> None:
    supervisor = stubs.supervisor(stubs.process("slow", 0, "sleep 300"), start_timeout=0.3)
    with pytest.raises(RoostError, match=r"slow does not serve after 0\.3 s"):
        await supervisor.start()


async def test_one_that_dies_is_reported_and_the_others_go_on(stubs: Stubs) -> None:
    supervisor = stubs.supervisor(stubs.process("north", 0, OBEDIENT), stubs.process("south", 0, OBEDIENT))
    await supervisor.start()
    north, south = supervisor.records()
    os.kill(north.pid, signal.SIGKILL)
    await eventually(lambda: stubs.reports, 5)
    assert "north was ended by SIGKILL" in stubs.reports[0]
    assert alive(south.pid)
    await supervisor.stop()
    assert len(stubs.reports) == 1, "what is stopped on purpose is not reported"


async def test_the_family_of_one_that_dies_goes_with_it(stubs: Stubs) -> None:
    supervisor = stubs.supervisor(stubs.process("parent", 0, FAMILY))
    await supervisor.start()
    child = int(await eventually(stubs.ready("parent").read_text, 5))
    os.kill(supervisor.records()[0].pid, signal.SIGKILL)
    await eventually(lambda: not alive(child), 5)


async def test_what_one_that_died_left_is_cleaned_away(stubs: Stubs) -> None:
    left, unneeded = stubs.directory / "left", stubs.directory / "unneeded"
    died = dataclasses.replace(
        stubs.process("died", 0, f"touch {left}; {OBEDIENT}"), clean=("bash", "-c", f"rm {left}")
    )
    obeyed = dataclasses.replace(stubs.process("obeyed", 0, OBEDIENT), clean=("touch", str(unneeded)))
    supervisor = stubs.supervisor(died, obeyed)
    await supervisor.start()
    os.kill(supervisor.records()[0].pid, signal.SIGKILL)
    await eventually(lambda: not left.exists(), 10)
    await supervisor.stop()
    assert not unneeded.exists(), "one that ended well has left nothing"


async def test_one_that_will_not_stop_is_killed_with_its_family(stubs: Stubs) -> None:
    supervisor = stubs.supervisor(
        stubs.process("stubborn", 0, STUBBORN), stubs.process("parent", 0, FAMILY), stop_timeout=0.3
    )
    await supervisor.start()
    child = int(await eventually(stubs.ready("parent").read_text, 5))
    await supervisor.stop()
    assert not alive(child)
    assert not any(alive(p.pid) for p in supervisor.records())


async def test_when_the_supervisor_is_killed_its_children_are_told(stubs: Stubs, tmp_path: Path) -> None:
    program = f"""
        import asyncio, pathlib
        from roost.up.layout import Process
        from roost.up.supervisor import Supervisor
        ready = pathlib.Path({str(tmp_path)!r}) / "ready"
        async def serves(process): return ready.exists()
        async def main():
            argv = ("bash", "-c", {OBEDIENT!r})
            one = Process("one", 0, argv, "", ready.with_name("one.log"), env={{"READY": str(ready)}})
            supervisor = Supervisor([one], serves, print)
            await supervisor.start()
            print(supervisor.records()[0].pid, flush=True)
            await asyncio.sleep(60)
        asyncio.run(main())
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", textwrap.dedent(program), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    pid = int(await asyncio.wait_for(process.stdout.readline(), 20))
    process.kill()
    await process.wait()
    await eventually(lambda: not alive(pid), 5)
    assert "stopped" in (tmp_path / "one.log").read_text()


# --- one at a time, and what a killed one leaves -------------------------------------------------


def test_only_one_mesh_runs_on_a_machine(tmp_path: Path) -> None:
    lock = tmp_path / "run" / "lock"
    with only_one(lock):
        with pytest.raises(RoostError) as caught:
            with only_one(lock):
                pass
        assert f"process {os.getpid()}" in caught.value.message
        assert "roost down" in caught.value.hint
    with only_one(lock):
        pass


def sleeper() -> subprocess.Popen[bytes]:
    return subprocess.Popen(["sleep", "300"])


def record_of(ours: subprocess.Popen[bytes], *children: subprocess.Popen[bytes]) -> Record:
    processes = tuple(
        ProcessRecord(f"p{c.pid}", c.pid, started_at(c.pid) or 0, "127.0.0.1:1", "log") for c in children
    )
    return Record(ours.pid, started_at(ours.pid) or 0, ("127.0.0.1:1",), processes)


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    with sleeper() as process:
        try:
            written = record_of(process, process)
            record.write(tmp_path, written)
            assert record.read(tmp_path) == written
            assert running(tmp_path) == written
        finally:
            process.kill()
    assert running(tmp_path) is None, "its process is gone"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 99}', '{"format": 1}'])
def test_a_record_that_makes_no_sense_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / record.RECORD_NAME).write_text(text)
    assert record.read(tmp_path) is None


def test_down_stops_what_runs_and_is_idempotent(tmp_path: Path) -> None:
    with sleeper() as process, sleeper() as stray:
        record.write(tmp_path, record_of(process, stray))
        assert take_down(tmp_path) is True
        assert process.wait(5) == -signal.SIGTERM
        assert stray.wait(5) == -signal.SIGTERM
    assert take_down(tmp_path) is False


def test_a_stranger_with_the_same_pid_is_left_alone() -> None:
    with sleeper() as process:
        try:
            assert stop(process.pid, (started_at(process.pid) or 0) - 1, 5) is False
            assert process.poll() is None
        finally:
            process.kill()


def test_what_does_not_obey_is_killed() -> None:
    with subprocess.Popen(
        ["bash", "-c", "trap '' TERM; echo; while :; do sleep 0.05; done"], stdout=-1
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        begun = time.monotonic()
        assert stop(process.pid, started_at(process.pid) or 0, 0.2) is True
        assert process.wait(5) == -signal.SIGKILL
        assert time.monotonic() - begun < 5
