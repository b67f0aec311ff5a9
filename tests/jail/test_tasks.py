"""Jails of programs that are no agents, on the real kernel: what they get, and what is left of them."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import dataclass

import pytest

from edge_agent.jail.api import Exit, JailGone, TaskJail
from edge_agent.jail.python import base_interpreter
from edge_agent.state.files import Entry, Kind
from shared.errors import Reason, RoostError
from shared.resources import Resources
from tests.support.eventually import eventually
from tests.support.jailer import RunningJailer, python, spec

LIMITS = Resources(memory_bytes=48 << 20, cpu_millis=500, pids=16)


@dataclass
class Ran:
    code: int | None
    output: str
    errors: str
    files: list[str]
    exit: Exit


async def begun(jailer: RunningJailer, *argv: str, id: str = "task-a") -> TaskJail:
    """What it writes is lost."""
    task = await jailer.jails.task(spec(id, argv, LIMITS))
    for fd in await task.begin():
        os.close(fd)
    return task


async def run(jailer: RunningJailer, *argv: str, id: str = "task-a") -> Ran:
    """For programs that write less than a pipe holds."""
    task = await jailer.jails.task(spec(id, argv, LIMITS))
    pipes = await task.begin()
    try:
        code = await task.wait(20.0)
        files = [entry.path for entry in await task.files.scan()]
    except JailGone:
        code, files = None, []
    exit = await task.kill()
    output, errors = (_all_of(fd) for fd in pipes)
    return Ran(code, output, errors, files, exit)


def _all_of(fd: int) -> str:
    with open(fd, "rb") as file:
        return file.read().decode()


async def run_python(jailer: RunningJailer, code: str) -> Ran:
    return await run(jailer, base_interpreter(), "-I", "-c", code)


async def test_it_gets_its_directory_and_three_descriptors_and_no_way_to_the_node(
    jailer: RunningJailer,
) -> None:
    ran = await run_python(
        jailer, "import os; print(os.getcwd(), os.listdir('/proc/self/fd'), sorted(os.environ), os.getuid())"
    )
    # The fourth is that of listdir itself.
    assert ran.output == "/state ['0', '1', '2', '3'] ['HOME', 'LANG', 'PATH', 'TMPDIR'] 1000\n"
    assert ran.exit == Exit(0, out_of_memory=False)


async def test_a_name_is_looked_for_inside_and_dev_stdout_can_be_written(jailer: RunningJailer) -> None:
    ran = await run(jailer, "sh", "-c", "echo a > /dev/stdout; echo b > /dev/stderr; kill -TERM $$")
    assert (ran.code, ran.output, ran.errors) == (-signal.SIGTERM, "a\n", "b\n")
    task = await jailer.jails.task(spec("task-b", ("no-such-program",), LIMITS))
    with pytest.raises(RoostError, match="no-such-program can't be run") as refused:
        await task.begin()
    assert refused.value.reason is Reason.JAIL_FAILED
    await task.kill()


async def test_what_the_program_left_running_ends_with_it(jailer: RunningJailer) -> None:
    code = (
        "import os\nif os.fork():\n    print('parent'); os._exit(4)\nos.setsid(); print('child', flush=True)"
    )
    task = await begun(jailer, "sh", "-c", "(while :; do echo x >> grows; done) & sleep 0.2; exit 6")
    assert await task.wait(20.0) == 6
    before = await task.files.scan()
    await asyncio.sleep(0.05)
    assert await task.files.scan() == before
    assert len(jailer.jailed()) == 1, "init alone"
    await task.kill()
    assert (await run_python(jailer, code)).code == 4


async def test_memory_and_files_count_against_the_task_alone(jailer: RunningJailer) -> None:
    parent = await jailer.jails.make(spec("parent", python("while True: send(recv())")))
    await parent.start()
    ran = await run_python(jailer, "x = bytearray(256 << 20)")
    assert ran.exit.out_of_memory
    ran = await run(jailer, "sh", "-c", f"{base_interpreter()} -c 'x = bytearray(256 << 20)'; exit 7")
    assert ran.exit.out_of_memory, "a child of the program, which itself went on"
    ran = await run_python(
        jailer,
        "import errno, itertools\n"
        "try:\n"
        "    with open('big', 'wb') as f:\n"
        "        for _ in range(256): f.write(bytes(1 << 20))\n"
        "except OSError as e: print(errno.errorcode[e.errno])\n"
        "open('big', 'w').close()\n"
        "try:\n"
        "    for n in itertools.count(): open(f'f{n}', 'w').close()\n"
        "except OSError as e: print(errno.errorcode[e.errno], n > 10_000)\n",
    )
    assert ran.output == "ENOSPC\nENOSPC True\n"
    assert len(ran.files) < 16_384
    await parent.send(b"still here")
    assert await parent.receive() == b"still here"


async def test_a_fork_bomb_stops_at_its_limit_and_ends_at_once(jailer: RunningJailer) -> None:
    code = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    task = await begun(jailer, base_interpreter(), "-I", "-c", code)
    assert await task.wait(1.0) is None
    assert len(jailer.jailed()) <= LIMITS.pids + 1, "with init"
    assert (await task.kill()).code == -9
    assert jailer.jailed() == []
    assert jailer.cgroups() == []


async def test_files_go_in_and_out_and_links_are_not_followed(jailer: RunningJailer) -> None:
    task = await jailer.jails.task(
        spec("task-a", ("sh", "-c", "cat sub/in > out; ln -s /etc/passwd link"), LIMITS)
    )
    await task.files.make_dir(Entry("sub", Kind.DIR, 0o755))
    fd = await task.files.open_write("sub/in")
    os.write(fd, b"given")
    os.close(fd)
    await task.files.commit_write(Entry("sub/in", Kind.FILE, 0o644))
    for end in await task.begin():
        os.close(end)
    assert await task.wait(20.0) == 0
    assert _all_of(await task.files.open_read("out")) == "given"
    with pytest.raises(FileNotFoundError):
        await task.files.open_read("link")
    with pytest.raises(ValueError, match="no path within a tree"):
        await task.files.open_read("../etc/passwd")
    await task.kill()


async def test_it_sees_nothing_of_other_jails(jailer: RunningJailer) -> None:
    parent = await jailer.jails.make(
        spec("parent", python("open('/state/secret', 'w').write('s'); send(b''); recv()"), TOKEN="secret")
    )
    await parent.start()
    await parent.receive()
    other = await begun(jailer, "sh", "-c", "echo secret > /tmp/secret; exec sleep 1000", id="task-other")
    ran = await run(
        jailer,
        "sh",
        "-c",
        "ls /state /tmp /dev/shm; cat /proc/[0-9]*/environ; echo; ls /proc | grep -c '^[0-9]'",
    )
    # Its own shell, ls and grep: of init nothing is shown.
    assert ran.output.split()[:3] == ["/dev/shm:", "/state:", "/tmp:"]
    assert "secret" not in ran.output
    assert int(ran.output.split()[-1]) <= 3
    await other.kill()


async def test_the_daemons_end_ends_tasks_and_leaves_nothing_of_them(jailer: RunningJailer) -> None:
    parent = await jailer.jails.make(spec("parent", python("while True: send(recv())")))
    await parent.start()
    for n in range(3):
        await begun(jailer, "sh", "-c", "sleep 1000 & echo x > file; wait", id=f"task-{n}")
    never_begun = await jailer.jails.task(spec("task-9", ("true",), LIMITS))
    os.kill(jailer.daemon_pid, signal.SIGKILL)
    jails = await jailer.reconnect()
    assert [jail.jail_id for jail in await jails.adopt()] == ["parent"]
    await eventually(lambda: {path.name for path in jailer.cgroups()} == {"parent"}, timeout=10.0)
    assert await jails.directories() == ["parent"]
    del never_begun


async def test_uids_are_given_back(jailer: RunningJailer) -> None:
    uids = set()
    for _ in range(3):
        task = await begun(jailer, "sleep", "1000")
        await eventually(lambda: len(jailer.jailed()) == 2, timeout=5.0)
        uids |= {os.stat(f"/proc/{pid}").st_uid for pid in jailer.jailed()}
        await task.kill()
    assert len(uids) == 2, "init's and the program's, every time the same"
