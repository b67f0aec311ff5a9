"""Commits on a node's stream: real gRPC, and a coordinator whose answers the test gives."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from coordinator.services.commit_stream import serve_commits
from edge_agent.commit_stream import CommitStream
from protos.v1 import link_pb2, link_pb2_grpc
from shared import rpc
from shared.errors import Reason, RoostError
from tests.support.eventually import eventually


class Coordinator(link_pb2_grpc.LinkServicer):
    """Answers by the turn's id: `wait` not before `go`, `stale` with a refusal, `bug` with a bug."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.seen: list[str] = []
        self.streams = 0

    async def Commits(  # type: ignore[override]
        self, request_iterator: AsyncIterator[link_pb2.CommitRequest], context: Any
    ) -> None:
        self.streams += 1
        await serve_commits(request_iterator, context, self._commit)

    async def _commit(self, request: link_pb2.CommitRequest, context: Any) -> link_pb2.CommitReply:
        self.seen.append(request.turn_id)
        match request.turn_id:
            case "wait":
                await self.go.wait()
            case "stale":
                raise RoostError(Reason.EPOCH_STALE, "another node owns it", "resolve again")
            case "bug":
                raise ZeroDivisionError
        return link_pb2.CommitReply()


@asynccontextmanager
async def streaming() -> AsyncIterator[tuple[Coordinator, CommitStream, Any]]:
    coordinator, server = Coordinator(), rpc.server()
    link_pb2_grpc.add_LinkServicer_to_server(coordinator, server)
    address = rpc.bind(server, "127.0.0.1:0")
    await server.start()
    async with rpc.channel(address) as channel:
        stream = CommitStream(link_pb2_grpc.LinkStub(channel), "c1")
        try:
            yield coordinator, stream, server
        finally:
            stream.close()
            await server.stop(None)


def request(turn_id: str) -> link_pb2.CommitRequest:
    return link_pb2.CommitRequest(turn_id=turn_id)


async def refused(stream: CommitStream, turn_id: str, timeout: float = 5.0) -> Reason:
    with pytest.raises(RoostError) as caught:
        await stream.ask(request(turn_id), timeout)
    return caught.value.reason


async def refused_or_done(stream: CommitStream, turn_id: str) -> Reason | None:
    try:
        await stream.ask(request(turn_id), 5.0)
    except RoostError as error:
        return error.reason
    return None


async def test_each_gets_its_own_answer_and_a_slow_one_holds_up_no_other() -> None:
    async with streaming() as (coordinator, stream, _):
        slow = asyncio.create_task(stream.ask(request("wait"), 5.0))
        await asyncio.gather(*(stream.ask(request(f"t{number}"), 5.0) for number in range(300)))
        assert await refused(stream, "stale") is Reason.EPOCH_STALE
        assert await refused(stream, "bug") is Reason.INTERNAL
        assert not slow.done()
        coordinator.go.set()
        await slow
        assert coordinator.streams == 1


async def test_no_answer_in_time_leaves_open_what_became_of_it() -> None:
    async with streaming() as (coordinator, stream, _):
        assert await refused(stream, "wait", 0.2) is Reason.COORDINATOR_UNREACHABLE
        assert coordinator.seen == ["wait"]
        coordinator.go.set()  # the answer that comes too late is nobody's
        await stream.ask(request("t1"), 5.0)


async def test_who_waits_when_the_stream_breaks_is_told_and_the_next_begins_another() -> None:
    async with streaming() as (coordinator, stream, _):
        waiting = asyncio.create_task(refused(stream, "wait"))
        await eventually(lambda: bool(coordinator.seen), 5.0, "the commit has come")
        assert stream._call is not None
        stream._call.cancel()
        assert await waiting is Reason.COORDINATOR_UNREACHABLE
        await stream.ask(request("t1"), 5.0)
        assert coordinator.streams == 2


async def test_fault_the_coordinator_goes_away_in_the_midst_of_a_commit() -> None:
    async with streaming() as (coordinator, stream, server):
        waiting = asyncio.create_task(refused(stream, "wait"))
        await eventually(lambda: bool(coordinator.seen), 5.0, "the commit has come")
        await server.stop(None)
        assert await waiting is Reason.COORDINATOR_UNREACHABLE
        assert await refused(stream, "t1") is Reason.COORDINATOR_UNREACHABLE


async def test_who_waits_when_the_link_ends_is_told() -> None:
    async with streaming() as (coordinator, stream, _):
        waiting = asyncio.create_task(refused(stream, "wait"))
        await eventually(lambda: bool(coordinator.seen), 5.0, "the commit has come")
        stream.close()
        assert await waiting is Reason.COORDINATOR_UNREACHABLE


async def test_fault_the_channel_is_closed_in_the_midst_of_commits() -> None:
    """Whoever is at it is told so; a task that nobody cancelled does not end as if it were."""
    async with streaming() as (_, stream, _), asyncio.TaskGroup() as group:
        many = [group.create_task(refused_or_done(stream, f"t{number}")) for number in range(200)]
        await asyncio.sleep(0.01)
        stream.close()
        outcomes = {await one for one in many}
    assert outcomes <= {None, Reason.COORDINATOR_UNREACHABLE}
