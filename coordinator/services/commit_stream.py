"""Commits of a node on one stream: each is carried out on its own, and answered when it is done."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from coordinator.services.guard import UNARY_LIMIT
from protos.v1 import link_pb2
from shared.errors import Reason, RoostError

log = logging.getLogger(__name__)

_AT_ONCE = 256  # commits under way of one node; more are not read yet

Commit = Callable[[link_pb2.CommitRequest, Any], Awaitable[link_pb2.CommitReply]]


async def serve_commits(
    requests: AsyncIterator[link_pb2.CommitRequest], context: Any, commit: Commit
) -> None:
    """Until the node ends the stream. `commit` as for a call of its own."""
    writing = asyncio.Lock()  # gRPC allows one write at a time
    room = asyncio.Semaphore(_AT_ONCE)

    async def one(request: link_pb2.CommitRequest) -> None:
        try:
            answer = await _answer(request, context, commit)
            async with writing:
                await context.write(answer)
        finally:
            room.release()

    async with asyncio.TaskGroup() as group:
        async for request in requests:
            await room.acquire()
            group.create_task(one(request), name="a commit")


async def _answer(request: link_pb2.CommitRequest, context: Any, commit: Commit) -> link_pb2.CommitAnswer:
    answer = link_pb2.CommitAnswer(request=request.request)
    try:
        async with asyncio.timeout(UNARY_LIMIT):
            await commit(request, context)
    except RoostError as error:
        answer.error.CopyFrom(error.to_proto())
    except TimeoutError:
        answer.error.CopyFrom(RoostError(Reason.DEADLINE, "the commit took too long", "try again").to_proto())
    except Exception:
        log.exception("a commit failed")
        failed = RoostError(Reason.INTERNAL, "the coordinator failed at a commit", "its log has the details")
        answer.error.CopyFrom(failed.to_proto())
    return answer
