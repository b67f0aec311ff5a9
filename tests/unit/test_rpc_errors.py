"""What the end of a call means to who made it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from shared import rpc
from shared.errors import Reason, RoostError, translated


class Silent(health_pb2_grpc.HealthServicer):
    async def Check(self, request: object, context: object) -> health_pb2.HealthCheckResponse:
        await asyncio.Event().wait()
        raise AssertionError


@pytest.fixture
async def address() -> AsyncIterator[str]:
    server = rpc.server()
    health_pb2_grpc.add_HealthServicer_to_server(Silent(), server)
    bound = rpc.bind(server, "127.0.0.1:0")
    await server.start()
    yield bound
    await server.stop(0)


async def call(channel: grpc.aio.Channel) -> None:
    with translated(Reason.COORDINATOR_UNREACHABLE, "coordinator c1"):
        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=30)


async def test_a_channel_closed_under_a_call_is_a_peer_that_went_away(address: str) -> None:
    """gRPC raises CancelledError then: unheeded, it would end the task that made the call."""
    channel = rpc.channel(address)
    task = asyncio.create_task(call(channel))
    await channel.channel_ready()
    await asyncio.sleep(0.05)
    await channel.close(None)
    with pytest.raises(RoostError, match="was closed") as caught:
        await task
    assert caught.value.reason is Reason.COORDINATOR_UNREACHABLE


async def test_a_task_that_is_cancelled_stays_cancelled(address: str) -> None:
    async with rpc.channel(address) as channel:
        task = asyncio.create_task(call(channel))
        await channel.channel_ready()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_a_deadline_of_our_own_stays_one(address: str) -> None:
    async with rpc.channel(address) as channel:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await call(channel)
