"""A node's commits to one coordinator, on one stream: a third of what a call each would cost.

Always true: whoever asks hears of the answer to its own request, or an error, within its time. How it can
fail: the stream breaks. Then nobody knows what became of the requests on their way, and the next one begins
another stream.
"""

from __future__ import annotations

import asyncio
import itertools

import grpc.aio

from protos.v1 import link_pb2, link_pb2_grpc
from shared.errors import Reason, RoostError, from_rpc

_Call = grpc.aio.StreamStreamCall[link_pb2.CommitRequest, link_pb2.CommitAnswer]


class CommitStream:
    def __init__(self, stub: link_pb2_grpc.LinkAsyncStub, coordinator: str) -> None:
        self._stub = stub
        self._peer = f"coordinator {coordinator}"
        self._call: _Call | None = None
        self._reader: asyncio.Task[None] | None = None
        self._numbers = itertools.count(1)
        self._asked: dict[int, asyncio.Future[link_pb2.CommitAnswer]] = {}
        self._writing = asyncio.Lock()  # gRPC allows one write at a time

    async def ask(self, request: link_pb2.CommitRequest, timeout: float) -> None:
        """Returns if it is committed; the coordinator's refusal, or COORDINATOR_UNREACHABLE: it may be."""
        request.request = next(self._numbers)
        asked = self._asked[request.request] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(timeout):
                async with self._writing:
                    await self._open().write(request)
                answer = await asked
        except TimeoutError as error:
            raise self._unreachable(f"did not answer within {timeout:g} s") from error
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error, Reason.COORDINATOR_UNREACHABLE, self._peer) from error
        except (grpc.aio.UsageError, asyncio.InvalidStateError, asyncio.CancelledError) as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise self._unreachable("ended the stream of commits") from error  # just now
        finally:
            del self._asked[request.request]
        if answer.HasField("error"):
            raise RoostError.from_proto(answer.error)

    def close(self) -> None:
        if self._call is not None:
            self._call.cancel()
        if self._reader is not None:
            self._reader.cancel()
        self._fail(self._unreachable("is not linked any more"))

    def _open(self) -> _Call:
        if self._call is None or self._call.done():
            self._call = self._stub.Commits()  # type: ignore[call-arg]  # messages are written one by one
            self._reader = asyncio.create_task(self._read(self._call), name="answers to commits")
        return self._call

    async def _read(self, call: _Call) -> None:
        error = self._unreachable("ended the stream of commits")
        try:
            while isinstance(answer := await call.read(), link_pb2.CommitAnswer):
                asked = self._asked.get(answer.request)
                if asked is not None and not asked.done():  # otherwise nobody waits any more
                    asked.set_result(answer)
        except grpc.aio.AioRpcError as broken:
            error = from_rpc(broken, Reason.COORDINATOR_UNREACHABLE, self._peer)
        finally:
            call.cancel()
            if call is self._call:
                self._fail(error)

    def _fail(self, error: RoostError) -> None:
        for asked in self._asked.values():
            if not asked.done():
                asked.set_exception(error)

    def _unreachable(self, what: str) -> RoostError:
        return RoostError(Reason.COORDINATOR_UNREACHABLE, f"{self._peer} {what}", "it is sent again")
