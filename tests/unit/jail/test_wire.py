"""Frames and descriptors over a socket pair."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from edge_agent.jail.wire import MAX_FRAME, Closed, Garbage, Wire, pair


@pytest.fixture
def ends() -> Iterator[tuple[Wire, Wire]]:
    left, right = (Wire(sock) for sock in pair())
    yield left, right
    left.close()
    right.close()


def _pipe_holding(data: bytes) -> int:
    readable, writable = os.pipe()
    os.write(writable, data)
    os.close(writable)
    return readable


def test_descriptors_come_with_the_frame_that_they_were_sent_with(ends: tuple[Wire, Wire]) -> None:
    left, right = ends
    left.send({"n": 1})
    left.send({"n": 2}, (_pipe_holding(b"a"), _pipe_holding(b"b")))
    left.send({"n": 3})
    left.send({"n": 4}, (_pipe_holding(b"c"),))
    frames = []
    while len(frames) < 4:
        frames += right.receive()
    assert [f.body for f in frames] == [{"n": n} for n in (1, 2, 3, 4)]
    assert [[os.read(fd, 9) for fd in f.fds] for f in frames] == [[], [b"a", b"b"], [], [b"c"]]
    for frame in frames:
        frame.close()


def test_a_peer_that_does_not_read_does_not_block(ends: tuple[Wire, Wire]) -> None:
    left, right = ends
    text = "x" * (MAX_FRAME // 2)
    for i in range(8):
        left.send({"n": i, "text": text})
    assert left.wants_write
    got = []
    while len(got) < 8:
        left.flush()
        got += [frame.body["n"] for frame in right.receive()]
    assert got == list(range(8))
    assert not left.wants_write


def test_a_frame_that_is_too_large_is_the_senders_bug(ends: tuple[Wire, Wire]) -> None:
    with pytest.raises(ValueError, match="more than"):
        ends[0].send({"text": "x" * MAX_FRAME})


def test_the_end_comes_after_what_was_sent_before_it(ends: tuple[Wire, Wire]) -> None:
    left, right = ends
    left.send({"last": "words"})
    left.close()
    assert [f.body for f in right.receive()] == [{"last": "words"}]
    with pytest.raises(Closed):
        right.receive()
    with pytest.raises(Closed):
        right.send({})


@pytest.mark.parametrize(
    "data",
    [
        (MAX_FRAME + 1).to_bytes(4, "big"),
        b"\0\0\0\x01x",
        b"\0\0\0\x02[]",
        b'\0\0\0\x09{"fds":1}',
        b'\0\0\0\x0a{"fds":-1}',
    ],
    ids=repr,
)
def test_garbage(data: bytes) -> None:
    sender, receiver = pair()
    with sender:
        sender.send(data)
        wire = Wire(receiver)
        with pytest.raises(Garbage):
            wire.receive()
        wire.close()


@pytest.mark.parametrize("frame", [b"{}", b'{"fds":1}'])
def test_unclaimed_descriptors_are_garbage_and_closed(frame: bytes) -> None:
    sender, receiver = pair()
    readable, writable = os.pipe()
    with sender:
        socket.send_fds(sender, [len(frame).to_bytes(4, "big") + frame], [writable, writable])
        os.close(writable)
        wire = Wire(receiver)
        with pytest.raises(Garbage):
            wire.receive()
        wire.close()
        assert os.read(readable, 1) == b"", "the last writing end is closed"
    os.close(readable)
