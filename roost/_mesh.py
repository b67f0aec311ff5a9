"""The client's two connections: to the coordinators, and to the node of one instance."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

import grpc
import grpc.aio

from protos.v1 import attach_pb2, attach_pb2_grpc
from roost._types import Delta, Receipt, Reply, Waiting
from shared import rpc
from shared.errors import Reason, RoostError, from_rpc

T = TypeVar("T")

ASK_TIMEOUT = 10.0  # seconds for one coordinator, before the next is asked
ATTACH_TIMEOUT = 10.0  # seconds for a node to accept a ticket
LEAVE_TIMEOUT = 3.0  # seconds for a node to say what came of a turn that was left, and so cancelled

_WRITE_FAILED = "Internal error from Core"  # what grpc.aio says when a stream broke while it wrote

_ASK_ANOTHER = frozenset({Reason.COORDINATOR_UNREACHABLE, Reason.STORE_UNAVAILABLE})


class Coordinators:
    """Several coordinators of one mesh: any of them can answer, so they are asked in turn."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._addresses = tuple(addresses)
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._first = 0  # the one that answered last

    async def ask(self, call: Callable[[grpc.aio.Channel, float], Awaitable[T]], timeout: float) -> T:
        """`call(channel, seconds)` on the first coordinator that can be reached, within `timeout` in all.

        RoostError: what the coordinator said, or COORDINATOR_UNREACHABLE if none answered.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        count = len(self._addresses)
        last = RoostError(Reason.COORDINATOR_UNREACHABLE, "no coordinator was asked")
        for offset in range(count):
            left = deadline - loop.time()
            if left <= 0:
                break
            index = (self._first + offset) % count
            address = self._addresses[index]
            try:
                answer = await call(self._channel(address), min(left, ASK_TIMEOUT))
            except grpc.aio.AioRpcError as error:
                last = from_rpc(error, Reason.COORDINATOR_UNREACHABLE, f"the coordinator at {address}")
                if last.reason not in _ASK_ANOTHER:
                    raise last from error
            else:
                self._first = index
                return answer
        if last.reason is Reason.COORDINATOR_UNREACHABLE and not last.hint:
            last.hint = (
                "is the mesh running? `roost up` starts one here; --coordinator HOST:PORT names another"
            )
        raise last

    async def close(self) -> None:
        channels, self._channels = self._channels, {}
        for channel in channels.values():
            await channel.close(None)

    def _channel(self, address: str) -> grpc.aio.Channel:
        if address not in self._channels:
            self._channels[address] = rpc.channel(address)
        return self._channels[address]


@dataclass(frozen=True, slots=True)
class Place:
    """Where an instance is, and the permission to talk to it."""

    node: str
    address: str
    ticket: bytes
    why: str


_Call = grpc.aio.StreamStreamCall[attach_pb2.AttachRequest, attach_pb2.AttachReply]


class Attachment:
    """One Attach stream. Turns go one after another; a stream whose turn was not read to its end is
    cancelled, so that a late reply can't be taken for that of the next turn."""

    def __init__(self, place: Place, channel: grpc.aio.Channel, call: _Call) -> None:
        self.place = place
        self._channel = channel
        self._call = call
        self._reading: asyncio.Future[object] | None = None

    @classmethod
    async def open(cls, place: Place, timeout: float) -> Attachment:
        """Attaches to `place`. RoostError: what the node said, or NODE_UNREACHABLE."""
        channel = rpc.channel(place.address)
        call = attach_pb2_grpc.AttachStub(channel).Attach()  # type: ignore[call-arg]  # written one by one
        attachment = cls(place, channel, call)
        try:
            await attachment._greet(min(timeout, ATTACH_TIMEOUT))
        except BaseException:
            await attachment.close()
            raise
        return attachment

    async def send(self, turn: attach_pb2.Turn) -> bool:
        """Sends a turn. False: the stream had ended, as it may between turns, and nothing was sent."""
        return await self._write(attach_pb2.AttachRequest(turn=turn))

    async def cancel(self, turn_id: str) -> None:
        """Asks that the sent turn end. `replies` says what comes of it."""
        await self._write(attach_pb2.AttachRequest(cancel=attach_pb2.Cancel(turn_id=turn_id)))

    async def replies(
        self, turn_id: str, timeout: float, cancel_if_left: bool
    ) -> AsyncGenerator[Waiting | Delta | Reply, None]:
        """What the sent turn waits for, its deltas, then its reply. RoostError: what the node said of it,
        NODE_UNREACHABLE if the stream broke, DEADLINE if there was no end within `timeout`.
        `cancel_if_left`: whoever leaves before the end cancels the turn."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        ended = False
        try:
            while not ended:
                reply = await self._read(deadline - loop.time(), Reason.DEADLINE)
                match reply.WhichOneof("kind"):
                    case "waiting":
                        yield Waiting(reply.waiting.text)
                    case "delta":
                        yield Delta(reply.delta.text)
                    case "failed":
                        ended = True
                        raise RoostError.from_proto(reply.failed.error)
                    case "committed":
                        ended = True
                        done = reply.committed
                        yield Reply(done.reply, Receipt.from_proto(done.receipt), turn_id, self.place.why)
        except (GeneratorExit, asyncio.CancelledError):
            if cancel_if_left and not ended:
                await self._take_back(turn_id)
            raise
        finally:
            if not ended:
                self._call.cancel()

    async def _take_back(self, turn_id: str) -> None:
        """Cancels a turn whose outcome nobody waits for: only until the node has heard of it."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + LEAVE_TIMEOUT
        with suppress(RoostError):
            await self.cancel(turn_id)
            kind = None
            while kind not in ("failed", "committed"):
                reply = await self._read(deadline - loop.time(), Reason.DEADLINE)
                kind = reply.WhichOneof("kind")

    async def close(self) -> None:
        self._call.cancel()
        if self._reading is not None:
            self._reading.cancel()
        await self._channel.close(None)

    async def _greet(self, timeout: float) -> None:
        await self._write(attach_pb2.AttachRequest(hello=attach_pb2.Hello(ticket=self.place.ticket)))
        reply = await self._read(timeout, Reason.NODE_UNREACHABLE)
        if reply.WhichOneof("kind") != "attached":
            raise RoostError(Reason.INTERNAL, f"node {self.place.node} did not answer the greeting")

    async def _write(self, request: attach_pb2.AttachRequest) -> bool:
        try:
            await self._call.write(request)
        except (asyncio.InvalidStateError, grpc.aio.AioRpcError):
            return False  # reading from it says why
        return True

    async def _read(self, timeout: float, late: Reason) -> attach_pb2.AttachReply:
        node = f"node {self.place.node}"
        # In a task of its own: whoever stops waiting for a read would end the stream with it.
        if self._reading is None:
            self._reading = asyncio.ensure_future(self._call.read())
        reading = self._reading
        if not (await asyncio.wait({reading}, timeout=max(0.0, timeout)))[0]:
            raise RoostError(late, f"{node} did not answer in time")
        self._reading = None
        try:
            reply = None if reading.cancelled() else reading.result()
        except grpc.aio.AioRpcError as error:
            if error.details() == _WRITE_FAILED:
                raise RoostError(Reason.NODE_UNREACHABLE, f"the connection to {node} broke") from error
            raise from_rpc(error, Reason.NODE_UNREACHABLE, node) from error
        if not isinstance(reply, attach_pb2.AttachReply):
            raise RoostError(Reason.NODE_UNREACHABLE, f"{node} closed the connection")
        return reply
