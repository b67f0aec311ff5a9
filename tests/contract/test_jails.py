"""What every `Jails` promises: the fake one, and the real jailer."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from edge_agent.jail.api import MAX_MESSAGE, Exit, Jail, JailGone, Jails, JailSpec
from edge_agent.state.files import Entry, Kind
from shared.errors import Reason, RoostError
from shared.resources import Resources
from tests.support.fake_jails import AgentExit, FakeAgent, FakeJails, FakeTask
from tests.support.jailer import LIMITS, needs_root, python, running_jailer, spec

# An agent that does what it is told: "echo TEXT", "write NAME" (in /state), "read NAME" (there), "exit CODE",
# "last WORDS" (sends them and exits with 0 at once), "dial PORT TEXT" (says TEXT to who listens there, and
# passes on the answer), "serve PORT" (listens there, and says to who comes what they said).
OBEDIENT = """
import threading
def serve(listening):
    peer, _ = listening.accept()
    peer.sendall(peer.recv(100))
    peer.close()
while True:
    word, _, rest = recv().decode().partition(" ")
    if word == "echo": send(rest.encode())
    if word == "write": open("/state/" + rest, "w").write(rest); send(b"written")
    if word == "read": send(open("/state/" + rest, "rb").read())
    if word == "exit": raise SystemExit(int(rest))
    if word == "last": send(rest.encode()); raise SystemExit(0)
    if word == "dial":
        port, _, text = rest.partition(" ")
        peer = socket.create_connection(("127.0.0.1", int(port)))
        peer.sendall(text.encode())
        send(peer.recv(100))
    if word == "serve":
        listening = socket.create_server(("127.0.0.1", int(rest)))
        threading.Thread(target=serve, args=(listening,)).start()
        send(b"served")
"""


async def obedient(agent: FakeAgent) -> None:
    while True:
        word, _, rest = (await agent.receive()).decode().partition(" ")
        match word:
            case "echo":
                await agent.send(rest.encode())
            case "write":
                (agent.state / rest).write_text(rest)
                await agent.send(b"written")
            case "read":
                await agent.send(await agent.read(rest))
            case "exit":
                raise AgentExit(int(rest))
            case "last":
                await agent.send(rest.encode())
                return
            case "dial":
                port, _, text = rest.partition(" ")
                await agent.send(await _said_to(agent.connect(int(port)), text))
            case "serve":
                listening = agent.listen(int(rest))
                listening.setblocking(True)
                threading.Thread(target=_serve, args=(listening,), daemon=True).start()
                await agent.send(b"served")


def _serve(listening: socket.socket) -> None:
    with suppress(OSError), listening, listening.accept()[0] as peer:  # its jail may end first
        peer.sendall(peer.recv(100))


async def _said_to(peer: socket.socket, text: str) -> bytes:
    """What comes back."""
    loop = asyncio.get_running_loop()
    with peer:
        await loop.sock_sendall(peer, text.encode())
        return await loop.sock_recv(peer, 100)


# A program that is no agent, and its argument: "work" (says something, copies `in`, exits with 3), or "hang".
WORK = """
if [ "$1" = hang ]; then echo waiting; exec sleep 1000; fi
echo said; echo complained >&2; cat in > out; exit 3
"""


async def work(task: FakeTask) -> int:
    if task.spec.argv[-1] == "hang":
        task.say(b"waiting\n")
        await asyncio.Event().wait()
    task.say(b"said\n", b"complained\n")
    (task.state / "out").write_bytes((task.state / "in").read_bytes())
    return 3


@dataclass
class World:
    jails: Jails
    argv: tuple[str, ...]

    def spec(self, jail_id: str) -> JailSpec:
        return spec(jail_id, self.argv)

    async def started(self, jail_id: str) -> Jail:
        jail = await self.jails.make(self.spec(jail_id))
        await jail.start()
        return jail


@asynccontextmanager
async def _fake(directory: Path) -> AsyncIterator[World]:
    jails = FakeJails(directory / "jails", obedient, work)
    yield World(jails, ("/agent/obedient",))
    await jails.close()


@asynccontextmanager
async def _real(directory: Path) -> AsyncIterator[World]:
    async with running_jailer() as jailer:
        yield World(jailer.jails, python(OBEDIENT))


@pytest.fixture(params=["fake", pytest.param("real", marks=needs_root)])
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    async with {"fake": _fake, "real": _real}[request.param](tmp_path) as world:
        yield world


async def _ask(jail: Jail, text: str, timeout: float = 10.0) -> bytes:
    async with asyncio.timeout(timeout):
        await jail.send(text.encode())
        return await jail.receive()


async def _gone(call: Callable[[], Awaitable[object]], timeout: float = 10.0) -> Exit:
    async with asyncio.timeout(timeout):
        with pytest.raises(JailGone) as caught:
            await call()
    return caught.value.exit


async def test_messages_go_both_ways_in_order_and_up_to_the_limit(world: World) -> None:
    jail = await world.started("a")
    assert await _ask(jail, "echo hello") == b"hello"
    for i in range(20):
        await jail.send(f"echo {i}".encode())
    assert [await jail.receive() for _ in range(20)] == [str(i).encode() for i in range(20)]
    large = "x" * (MAX_MESSAGE - len("echo "))
    assert await _ask(jail, f"echo {large}") == large.encode()
    with pytest.raises(RoostError) as refused:
        await jail.send(b"x" * (MAX_MESSAGE + 1))
    assert refused.value.reason is Reason.MESSAGE_TOO_LARGE
    assert await _ask(jail, "echo still here") == b"still here"


async def test_a_cancelled_receive_loses_nothing(world: World) -> None:
    jail = await world.started("a")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await jail.receive()
    assert await _ask(jail, "echo late") == b"late"


async def test_the_state_is_shared_with_its_files_and_outlives_the_jail(world: World) -> None:
    jail = await world.started("a")
    assert await _ask(jail, "write diary") == b"written"
    assert [(e.path, e.kind, e.size) for e in await jail.files.scan()] == [("diary", Kind.FILE, 5)]
    await jail.kill()
    again = await world.jails.make(world.spec("a"))
    assert [e.path for e in await again.files.scan()] == ["diary"]
    other = await world.jails.make(world.spec("b"))
    assert await other.files.scan() == []


@asynccontextmanager
async def _waiting_for_a_guarded_file(world: World) -> AsyncIterator[tuple[Jail, int]]:
    """A jail whose agent reads the file "large", with a descriptor to fill it."""
    jail = await world.started("a")
    fd = await jail.files.open_write("large")
    opening = asyncio.Event()
    await jail.guard(fd, opening.set)
    await jail.files.commit_write(Entry("large", Kind.FILE, 0o600))
    await jail.send(b"read large")
    async with asyncio.timeout(10):
        await opening.wait()
    yield jail, fd
    os.close(fd)


async def test_who_opens_a_guarded_file_waits_until_it_is_released(world: World) -> None:
    async with _waiting_for_a_guarded_file(world) as (jail, fd):
        reading = asyncio.create_task(jail.receive())
        await asyncio.sleep(0.05)
        assert not reading.done()
        os.write(fd, b"all of it")
        await jail.release(fd)
        async with asyncio.timeout(10):
            assert await reading == b"all of it"
        assert await _ask(jail, "read large") == b"all of it"


async def test_the_daemon_reads_a_guarded_file_without_waiting(world: World) -> None:
    async with _waiting_for_a_guarded_file(world) as (jail, fd):
        os.write(fd, b"half")
        async with asyncio.timeout(10):
            reading = await jail.files.open_read("large")
        assert os.read(reading, 10) == b"half"
        os.close(reading)


async def test_an_agent_that_waits_for_a_guarded_file_is_frozen_or_said_not_to_stop(world: World) -> None:
    async with _waiting_for_a_guarded_file(world) as (jail, fd):
        async with asyncio.timeout(20):
            try:
                await jail.freeze()
            except RoostError as error:  # cgroup v2, or a kernel before 6.18
                assert "did not stop" in error.message
            await jail.release(fd)
            await jail.thaw()
            assert await jail.receive() == b""


async def test_an_agent_that_waits_for_a_guarded_file_can_be_killed(world: World) -> None:
    async with _waiting_for_a_guarded_file(world) as (jail, _), asyncio.timeout(10):
        await jail.kill()


async def test_the_exit_is_told_to_whoever_waits_and_to_whoever_asks_later(world: World) -> None:
    jail = await world.started("a")
    waiting = asyncio.create_task(jail.receive())
    await jail.send(b"exit 3")
    assert (await _gone(lambda: waiting)).code == 3
    calls = (lambda: jail.send(b"x"), jail.receive, jail.freeze, jail.thaw, jail.usage)
    for call in (*calls, lambda: jail.files.scan()):  # noqa: PLW0108
        exit = await _gone(call)
        assert (exit.code, exit.out_of_memory) == (3, False)
    assert (await jail.kill()).code == 3


async def test_what_was_sent_before_the_end_is_received_first(world: World) -> None:
    jail = await world.started("a")
    assert await _ask(jail, "last words") == b"words"
    assert (await _gone(jail.receive)).code == 0


async def test_kill_ends_it_as_often_as_one_likes(world: World) -> None:
    jail = await world.started("a")
    waiting = asyncio.create_task(jail.receive())
    await asyncio.sleep(0)
    first = await jail.kill()
    assert (first.code, first.out_of_memory) == (-9, False)
    assert await jail.kill() == first
    assert await _gone(lambda: waiting) == first


async def test_a_jail_that_was_never_started_can_be_killed(world: World) -> None:
    jail = await world.jails.make(world.spec("a"))
    assert (await jail.kill()).code == -9


async def test_an_agent_is_started_once(world: World) -> None:
    jail = await world.started("a")
    with pytest.raises(RoostError, match="already") as refused:
        await jail.start()
    assert refused.value.reason is Reason.JAIL_FAILED
    assert await _ask(jail, "echo unharmed") == b"unharmed"


async def test_one_id_has_one_jail_at_a_time(world: World) -> None:
    jail = await world.started("a")
    with pytest.raises(RoostError, match="already") as refused:
        await world.jails.make(world.spec("a"))
    assert refused.value.reason is Reason.JAIL_FAILED
    assert await _ask(jail, "echo unharmed") == b"unharmed"


@pytest.mark.parametrize("jail_id", ["", "..", "a/b", "A", "a" * 65, "ä", "a\n", ".trash-a"])
async def test_names_that_could_be_paths_are_refused(world: World, jail_id: str) -> None:
    with pytest.raises(RoostError) as refused:
        await world.jails.make(world.spec(jail_id))
    assert refused.value.reason is Reason.JAIL_FAILED


async def test_limits_must_be_given(world: World) -> None:
    with pytest.raises(RoostError, match="memory_bytes"):
        await world.jails.make(JailSpec("a", "v1", world.argv))


async def test_a_frozen_agent_answers_only_when_thawed_while_its_files_can_be_read(world: World) -> None:
    jail = await world.started("a")
    await _ask(jail, "write diary")
    await jail.freeze()
    await jail.freeze()
    await jail.send(b"echo now")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await jail.receive()
    assert [e.path for e in await jail.files.scan()] == ["diary"]
    await jail.thaw()
    async with asyncio.timeout(5.0):
        assert await jail.receive() == b"now"
    await jail.freeze()
    assert (await jail.kill()).code == -9


async def test_what_runs_gets_other_limits(world: World) -> None:
    jail = await world.started("a")
    assert jail.limits == LIMITS
    for limits in (Resources(256 << 20, 2000, 64), Resources(100 << 20, 500, 16)):
        await jail.resize(limits)
        assert jail.limits == limits
    with pytest.raises(RoostError) as refused:
        await jail.resize(Resources(1, 1, 0))
    assert refused.value.reason is Reason.JAIL_FAILED
    assert jail.limits == limits
    assert await _ask(jail, "echo unharmed") == b"unharmed"
    await jail.kill()
    with pytest.raises(JailGone):
        await jail.resize(LIMITS)


async def test_usage_counts_what_runs(world: World) -> None:
    jail = await world.started("a")
    await _ask(jail, "echo here")
    usage = await jail.usage()
    assert 0 < usage.memory_bytes <= LIMITS.memory_bytes
    assert usage.cpu_seconds > 0
    assert usage.pids == 2  # with init


async def test_directories_stay_until_they_are_discarded(world: World) -> None:
    jails = world.jails
    assert await jails.directories() == []
    for jail_id in ("b", "a", "c"):
        jail = await world.started(jail_id)
        await _ask(jail, "write diary")
        if jail_id != "c":
            await jail.kill()
    assert await jails.directories() == ["a", "b", "c"]
    await jails.discard("a")
    await jails.discard("never-was")
    assert await jails.directories() == ["b", "c"]
    with pytest.raises(RoostError, match="runs"):
        await jails.discard("c")
    assert await (await jails.make(world.spec("a"))).files.scan() == []


async def test_the_daemon_is_who_listens_at_a_port_inside(world: World) -> None:
    jail = await world.jails.make(world.spec("a"))
    with await jail.listen(4000) as listening:  # before anything of the agent runs
        await jail.start()
        await jail.send(b"dial 4000 hello")
        async with asyncio.timeout(10.0):
            peer, _ = await asyncio.get_running_loop().sock_accept(listening)
            with peer:
                assert await asyncio.get_running_loop().sock_recv(peer, 100) == b"hello"
                await asyncio.get_running_loop().sock_sendall(peer, b"welcome")
            assert await jail.receive() == b"welcome"
        with pytest.raises(RoostError, match="4000") as refused:
            await jail.listen(4000)
        assert refused.value.reason is Reason.JAIL_FAILED
    assert await _ask(jail, "echo unharmed") == b"unharmed"
    (await jail.listen(4000)).close()  # as the next daemon does


async def test_the_daemon_connects_to_a_port_inside(world: World) -> None:
    jail = await world.started("a")
    with pytest.raises(ConnectionRefusedError, match="4000"):
        await jail.connect(4000)
    assert await _ask(jail, "serve 4000") == b"served"
    async with asyncio.timeout(10.0):
        assert await _said_to(await jail.connect(4000), "hello") == b"hello"


async def test_two_jails_have_two_networks(world: World) -> None:
    first, second = await world.started("a"), await world.started("b")
    assert await _ask(first, "serve 4000") == b"served"
    with pytest.raises(ConnectionRefusedError):
        await second.connect(4000)
    (await second.listen(4000)).close()


@pytest.mark.parametrize("port", [0, -1, 65_536])
async def test_what_is_no_port_is_refused(world: World, port: int) -> None:
    jail = await world.started("a")
    for call in (jail.listen, jail.connect):
        with pytest.raises(RoostError) as refused:
            await call(port)
        assert refused.value.reason is Reason.JAIL_FAILED
    assert await _ask(jail, "echo unharmed") == b"unharmed"


async def test_a_jail_that_has_ended_has_no_network(world: World) -> None:
    jail = await world.started("a")
    await jail.kill()
    for call in (jail.listen, jail.connect):
        assert (await _gone(lambda: call(4000))).code == -9  # noqa: B023


def _all_of(fd: int) -> bytes:
    with open(fd, "rb") as file:
        return file.read()


async def test_a_task_says_how_it_ended_and_leaves_its_files_until_it_is_killed(world: World) -> None:
    task = await world.jails.task(spec("task-a", ("sh", "-c", WORK, "task", "work")))
    fd = await task.files.open_write("in")
    os.write(fd, b"given")
    os.close(fd)
    await task.files.commit_write(Entry("in", Kind.FILE, 0o644))
    output, errors = await task.begin()
    assert await task.wait(10.0) == 3
    assert await task.wait(10.0) == 3
    assert (_all_of(output), _all_of(errors)) == (b"said\n", b"complained\n")
    assert [e.path for e in await task.files.scan()] == ["in", "out"]
    assert _all_of(await task.files.open_read("out")) == b"given"
    assert await task.kill() == Exit(3, out_of_memory=False)
    await _gone(lambda: task.wait(1.0))


async def test_a_task_that_goes_on_is_killed_and_leaves_no_directory(world: World) -> None:
    task = await world.jails.task(spec("task-a", ("sh", "-c", WORK, "task", "hang")))
    output, errors = await task.begin()
    assert await task.wait(0.01) is None
    waiting = asyncio.create_task(task.wait(10.0))
    assert (await task.kill()).code == -9
    await _gone(lambda: waiting)
    assert (await task.kill()).code == -9
    assert (_all_of(errors), _all_of(output)) in [(b"", b""), (b"", b"waiting\n")]
    assert await world.jails.directories() == []
    assert await world.jails.adopt() == []


async def test_a_task_that_was_never_begun_can_be_killed(world: World) -> None:
    task = await world.jails.task(spec("task-a", ("true",)))
    assert (await task.kill()).code == -9
