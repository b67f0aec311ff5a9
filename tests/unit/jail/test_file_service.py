"""The file service's work for jails that are directories, with both its peers in the same thread."""

from __future__ import annotations

import json
import math
import os
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from edge_agent.jail.file_service import Service
from edge_agent.jail.wire import Closed, Frame, Wire, close_all, pair

_SECONDS = 10.0
_A_SECOND = 8 << 20  # bytes of output that are read


class Peer:
    """The daemon's end of a control socket, or the jailer's."""

    def __init__(self, world: World, sock: socket.socket) -> None:
        self._world = world
        self.sock = sock
        self.wire = Wire(sock)
        self._heard: list[Frame] = []

    def ask(self, **body: Any) -> None:
        self.wire.send(body)

    def hear(self) -> dict[str, Any]:
        """The next that comes. Its descriptors are closed."""
        until = time.monotonic() + _SECONDS
        while not self._heard:
            assert time.monotonic() < until, "nothing came"
            self._world.service.turn(0.001)
            self.wire.flush()
            self._heard += self.wire.receive()
        frame = self._heard.pop(0)
        frame.close()
        return frame.body

    def rest(self) -> Iterator[int]:
        """Ids of what comes until the other end is closed."""
        with suppress(Closed):
            while True:
                yield self.hear()["id"]

    def answer(self) -> tuple[dict[str, Any], list[str]]:
        """The next, and the paths in the parts before it."""
        paths: list[str] = []
        while "part" in (body := self.hear()):
            paths += [entry[0] for entry in body["part"]]
        return body, paths


class World:
    def __init__(self, directory: Path) -> None:
        self._directory = directory
        jailer, theirs = pair()
        self.service = Service(Wire(theirs))
        self.jailer = Peer(self, jailer)
        self.outputs: dict[int, int] = {}  # the agents' ends

    def jail(self, number: int, *names: str) -> Path:
        """Its state, with empty files of these names."""
        state = self._directory / str(number)
        state.mkdir()
        for name in names:
            (state / name).touch()
        readable, self.outputs[number] = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        names = {"jail": number, "name": f"jail-{number}"}
        uids = {"owner": os.getuid(), "keeper": os.getuid()}
        self.jailer.wire.send({"do": "serve", **names, **uids}, (os.open(state, os.O_RDONLY), readable))
        return state

    def daemon(self, number: int) -> Peer:
        ours, theirs = pair()
        self.jailer.wire.send({"do": "control", "jail": number}, (theirs.detach(),))
        return Peer(self, ours)

    def turns(self, count: int) -> None:
        for _ in range(count):
            self.service.turn(0.0)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.jailer.wire.close()
    close_all(world.outputs.values())
    with pytest.raises(Closed):
        world.service.run()


def test_requests_behind_each_other_are_answered_in_order(world: World) -> None:
    world.jail(1, *(f"f{i:04}" for i in range(3000)))
    daemon = world.daemon(1)
    for number in range(20):
        if number % 2:
            daemon.ask(id=number, do="open_read", path="f0001")
        else:
            daemon.ask(id=number, do="scan")
    for number in range(20):
        body, paths = daemon.answer()
        assert (body["id"], len(paths)) == (number, 0 if number % 2 else 3000)


def test_a_daemon_that_reads_less_than_it_asks_is_heard_no_more(world: World) -> None:
    """Neither its requests nor the answers to them add up."""
    world.jail(1, *(f"{'f' * 200}{i:05}" for i in range(2000)))
    daemon = world.daemon(1)
    text = json.dumps({"do": "scan"}).encode()
    frame = len(text).to_bytes(4, "big") + text
    sent = answered = 0
    for _ in range(40):
        with suppress(BlockingIOError):
            while True:  # a cut frame is made up for by the next
                sent += daemon.sock.send((frame * 1000)[sent % len(frame) :])
        world.turns(50)
        daemon.hear()
        answered += 1
    assert sent // len(frame) - answered < 30_000, "what a socket holds, and what is read at once"


def test_who_waits_is_answered_while_another_does_not_read(world: World) -> None:
    world.jail(1, *(f"{'f' * 200}{i:05}" for i in range(2000)))
    world.jail(2, "mine")
    deaf, other = world.daemon(1), world.daemon(2)
    for _ in range(10):
        deaf.ask(id=0, do="scan")
    for number in range(10):
        other.ask(id=number, do="scan")
        assert other.answer() == ({"id": number, "ok": {}}, ["mine"])


def test_a_new_control_socket_in_the_midst_of_an_answer(world: World) -> None:
    names = [f"{'f' * 200}{i:05}" for i in range(5000)]
    world.jail(1, *names)
    old = world.daemon(1)
    old.ask(id=1, do="scan")
    old.ask(id=2, do="scan")
    assert "part" in old.hear()
    new = world.daemon(1)
    new.ask(id=7, do="scan")
    assert new.answer() == ({"id": 7, "ok": {}}, names)
    assert set(old.rest()) <= {1}


@pytest.mark.parametrize("asked", ["scan", "changed", "open_write", "open_read"])
def test_a_jail_that_is_ended_at_any_time_leaves_no_descriptor(world: World, asked: str) -> None:
    """Of so large a file "changed" does a part aside."""
    for number in range(1, 30):
        before = _open_descriptors()
        state = world.jail(number, *(f"f{i:02}" for i in range(number)))
        (state / "large").write_bytes(bytes(2 << 20))
        daemon = world.daemon(number)
        daemon.ask(id=1, do=asked, path="large", since_ns=0)
        world.turns(number)
        world.jailer.ask(do="end", jail=number)
        assert world.jailer.hear() == {"ended": number, "tail": ""}
        daemon.wire.close()
        os.close(world.outputs.pop(number))
        until = time.monotonic() + _SECONDS
        while _open_descriptors() != before:
            assert time.monotonic() < until, "what was done aside is done"
            world.turns(1)


def test_an_end_and_last_words_at_once(world: World) -> None:
    world.jail(1)
    world.turns(2)
    world.jailer.ask(do="end", jail=1)
    os.write(world.outputs[1], b"farewell\n")
    assert world.jailer.hear() == {"ended": 1, "tail": "farewell\n"}


def test_who_prints_too_much_waits_and_nobody_else(world: World) -> None:
    world.jail(1)
    world.jail(2, "mine")
    other = world.daemon(2)
    began, printed = time.monotonic(), 0
    for number in range(1500):
        try:
            printed += os.write(world.outputs[1], bytes(1 << 16))
        except BlockingIOError:
            other.ask(id=number, do="scan")
            assert other.answer()[1] == ["mine"]
        world.turns(1)
    seconds = math.ceil(time.monotonic() - began)
    assert printed > _A_SECOND
    assert printed <= (seconds + 1) * (_A_SECOND + (1 << 17))


def test_what_fails_of_one_jail_fails_for_it_alone(world: World) -> None:
    world.jail(1)
    world.jail(2, "mine")
    one, other = world.daemon(1), world.daemon(2)
    one.ask(id=1, do="open_write", path="f")
    one.hear()
    one.ask(id=2, do="commit_write", entry=["f", "file", 0o600, 0, 1 << 100, 0, 0, ""], more=False)
    with pytest.raises(Closed):
        one.hear()
    other.ask(id=1, do="scan")
    assert other.answer()[1] == ["mine"]
    again = world.daemon(1)
    again.ask(id=1, do="scan")
    assert again.answer() == ({"id": 1, "ok": {}}, [])


def test_a_state_is_measured_while_its_daemon_does_not_read(world: World) -> None:
    state = world.jail(1, *(f"{'f' * 200}{i:05}" for i in range(3000)))
    (state / "large").write_bytes(bytes(1 << 20))
    deaf = world.daemon(1)
    for _ in range(10):
        deaf.ask(id=0, do="scan")
    for most, over in ((8 << 20, False), (1 << 18, True)):
        world.jailer.ask(do="measure", jail=1, most=most)
        assert world.jailer.hear() == {"measured": 1, "over": over}


def test_a_jailer_that_asks_of_many_before_it_reads_is_answered(world: World) -> None:
    """It reads from no peer that does not read: neither may wait for the other."""
    numbers = list(range(1, 61))
    for number in numbers:
        world.jail(number)
    world.turns(100)
    for sock in (world.jailer.sock, world.service._jailer._sock):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the least that the kernel allows
    for _ in range(3):
        for number in numbers:
            world.jailer.ask(do="measure", jail=number, most=1)
    until = time.monotonic() + _SECONDS
    while world.jailer.wire.wants_write:
        assert time.monotonic() < until, "each waits for the other"
        world.service.turn(0.001)
        world.jailer.wire.flush()
    assert {world.jailer.hear()["measured"] for _ in numbers} <= set(numbers)


def _open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))
