"""The daemon's end of a turn socket."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator

import pytest

from edge_agent.jail.api import MAX_MESSAGE
from edge_agent.jail.turns import TurnsEnded, TurnSocket
from edge_agent.jail.wire import pair
from shared.errors import Reason, RoostError


@pytest.fixture
async def ends() -> AsyncIterator[tuple[TurnSocket, socket.socket]]:
    ours, agents = pair()
    agents.setblocking(False)
    turns = TurnSocket(ours)
    yield turns, agents
    turns.close()
    agents.close()


def _successor(turns: TurnSocket) -> TurnSocket:
    """What a later daemon gets: another descriptor of the same socket."""
    return TurnSocket(socket.socket(fileno=os.dup(turns._sock.fileno())))


async def test_it_reads_no_further_than_the_message_that_it_returns(
    ends: tuple[TurnSocket, socket.socket],
) -> None:
    turns, agent = ends
    agent.send(b"\0\0\0\x03one\0\0\0\x03two")
    assert await turns.receive() == b"one"
    successor = _successor(turns)
    assert not successor.torn
    assert await successor.receive() == b"two"
    successor.close()


async def test_an_end_in_the_midst_of_receiving_is_seen_by_a_successor(
    ends: tuple[TurnSocket, socket.socket],
) -> None:
    turns, agent = ends
    agent.send(b"\0\0\0\x03o")
    receiving = asyncio.create_task(turns.receive())
    await asyncio.sleep(0)
    successor = _successor(turns)
    assert successor.torn
    agent.send(b"ne")
    assert await receiving == b"one"
    assert not successor.torn
    successor.close()


async def test_an_end_in_the_midst_of_sending_is_seen_by_a_successor(
    ends: tuple[TurnSocket, socket.socket],
) -> None:
    turns, agent = ends
    sending = asyncio.create_task(turns.send(bytes(1 << 20)))
    await asyncio.sleep(0)
    successor = _successor(turns)
    assert successor.torn
    successor.close()
    loop = asyncio.get_running_loop()
    left = 4 + (1 << 20)
    while left:
        left -= len(await loop.sock_recv(agent, left))
    await sending
    assert not turns.torn


async def test_a_cancelled_send_ends_the_socket(ends: tuple[TurnSocket, socket.socket]) -> None:
    turns, _ = ends
    sending = asyncio.create_task(turns.send(bytes(MAX_MESSAGE)))
    await asyncio.sleep(0)
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending
    with pytest.raises(TurnsEnded):
        await turns.send(b"half a message went before")
    assert turns.torn


async def test_the_end_is_told_after_what_was_sent(ends: tuple[TurnSocket, socket.socket]) -> None:
    turns, agent = ends
    agent.send(b"\0\0\0\x04last")
    agent.close()
    assert await turns.receive() == b"last"
    with pytest.raises(TurnsEnded):
        await turns.receive()
    with pytest.raises(TurnsEnded):
        await turns.send(b"x")


async def test_whoever_waits_is_woken_at_the_end(ends: tuple[TurnSocket, socket.socket]) -> None:
    turns, _ = ends
    receiving = asyncio.create_task(turns.receive())
    await asyncio.sleep(0)
    turns.end()
    with pytest.raises(TurnsEnded):
        await receiving


async def test_a_length_beyond_the_limit_is_a_crash(ends: tuple[TurnSocket, socket.socket]) -> None:
    turns, agent = ends
    agent.send((MAX_MESSAGE + 1).to_bytes(4, "big"))
    with pytest.raises(RoostError) as error:
        await turns.receive()
    assert error.value.reason is Reason.AGENT_CRASHED
