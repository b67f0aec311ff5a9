"""The client with an event loop.

A turn gets its id once. Whatever fails on the way, the same turn is sent again under that id, to the node
that owns the instance by then, until it is committed or the turn's deadline has passed: it is applied once.
"""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import grpc.aio

from protos.v1 import common_pb2, resolver_pb2, resolver_pb2_grpc
from roost._mesh import Attachment, Coordinators, Place
from roost._turns import Failed, Failure, GiveUp, Progress, Refused, ResolveAgain, SendAgain, decide
from roost._types import Delta, Event, Reply, Restarted
from roost._where import find_coordinators
from shared.errors import Reason, Remedy, RoostError
from shared.identity import InstanceKey
from shared.rpc import MAX_TURN_BYTES

TURN_TIMEOUT = 60.0  # seconds for a turn, all tries included
_MAX_TURN_ID = 128


class AsyncClient:
    """A user's program's side of the mesh. `position` is (latitude, longitude) in degrees, if known.

    `coordinators` are HOST:PORT; without them ROOST_COORDINATORS (commas between), and then those of
    `roost up` on this machine are used. COORDINATOR_UNREACHABLE if there are none either.
    """

    def __init__(
        self,
        coordinators: Sequence[str] | None = None,
        tenant: str = "default",
        position: tuple[float, float] | None = None,
    ) -> None:
        self._coordinators = Coordinators(find_coordinators(coordinators))
        self._tenant = tenant
        self._position = position

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *exc: Any) -> None:
        await self.close()

    async def close(self) -> None:
        await self._coordinators.close()

    def attach(self, agent: str, user: str) -> AsyncChat:
        """The chat of `user` with their instance of `agent`. BAD_REQUEST if one of the names can't be."""
        return AsyncChat(self._coordinators, InstanceKey(self._tenant, agent, user), self._position)


class AsyncChat:
    """One user's conversation with their instance. Turns are serial: a second one waits for the first."""

    def __init__(
        self, coordinators: Coordinators, key: InstanceKey, position: tuple[float, float] | None
    ) -> None:
        self.key = key
        self._coordinators = coordinators
        self._position = position
        self._attachment: Attachment | None = None
        self._serial = asyncio.Lock()

    async def __aenter__(self) -> AsyncChat:
        return self

    async def __aexit__(self, *exc: Any) -> None:
        await self.close()

    async def close(self) -> None:
        attachment, self._attachment = self._attachment, None
        if attachment is not None:
            await attachment.close()

    async def send(self, message: str, turn_id: str | None = None, timeout: float = TURN_TIMEOUT) -> Reply:
        """The committed reply to `message`. To repeat a turn whose end is unknown, give its `turn_id` again.

        RoostError if the turn failed; its state is then as it was. After DEADLINE or a reason of its remedies
        RETRY and RESOLVE it may still be applied: send it again under the same id to find out.
        """
        async with aclosing(self.stream(message, turn_id, timeout)) as events:
            async for event in events:
                if isinstance(event, Reply):
                    return event
        raise AssertionError("a stream ends with a reply or an error")

    async def stream(
        self, message: str, turn_id: str | None = None, timeout: float = TURN_TIMEOUT
    ) -> AsyncGenerator[Event, None]:
        """As `send`, but yields each Delta as it comes, Restarted when those so far are void, and in the end
        the Reply, which alone is true."""
        turn_id = uuid.uuid4().hex if turn_id is None else turn_id
        _check(message, turn_id)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        async with self._serial:
            progress = Progress()
            while True:
                said = False
                failure: Failure | None = None
                attempt = self._attempt(turn_id, message, progress.exclude, deadline)
                async with aclosing(attempt) as events:
                    async for event in events:
                        match event:
                            case Delta():
                                said = True
                                yield event
                            case Reply():
                                yield event
                                return
                            case Refused() | Failed():
                                failure = event
                assert failure is not None, "an attempt ends with a reply or a failure"
                progress, step = decide(progress, failure, deadline - loop.time())
                match step:
                    case GiveUp(error):
                        raise _gave_up(error, turn_id, timeout, deadline - loop.time())
                    case ResolveAgain(pause):
                        await self.close()
                    case SendAgain(pause):
                        pass
                if said:
                    yield Restarted()
                await asyncio.sleep(pause * random.uniform(0.5, 1.0))

    async def _attempt(
        self, turn_id: str, message: str, exclude: frozenset[str], deadline: float
    ) -> AsyncGenerator[Delta | Reply | Failure, None]:
        """One try: resolve and attach if need be, then the turn. Ends with a Reply or a Failure."""
        loop = asyncio.get_running_loop()
        place = self._attachment.place if self._attachment is not None else None
        try:
            if place is None:
                place = await self._resolve(exclude, deadline - loop.time())
            if self._attachment is None or not await self._attachment.send(turn_id, message):
                await self.close()
                self._attachment = await Attachment.open(place, deadline - loop.time())
                await self._attachment.send(turn_id, message)  # should it break: reading says so
            replies = self._attachment.replies(turn_id, deadline - loop.time())
            async with aclosing(replies) as events:
                async for event in events:
                    yield event
        except RoostError as error:
            yield Refused(error) if place is None else Failed(place.node, error)

    async def _resolve(self, exclude: frozenset[str], timeout: float) -> Place:
        request = resolver_pb2.ResolveRequest(key=self.key.to_proto(), exclude=sorted(exclude))
        if self._position is not None:
            latitude, longitude = self._position
            request.position.CopyFrom(common_pb2.Position(latitude=latitude, longitude=longitude))

        async def call(channel: grpc.aio.Channel, seconds: float) -> resolver_pb2.ResolveReply:
            return await resolver_pb2_grpc.ResolverStub(channel).Resolve(request, timeout=seconds)

        reply = await self._coordinators.ask(call, timeout)
        return Place(reply.node, reply.address, reply.ticket, reply.why)


def _check(message: str, turn_id: str) -> None:
    try:
        size = len(message.encode())
    except UnicodeEncodeError as error:
        raise RoostError(
            Reason.BAD_REQUEST,
            "the message holds characters that UTF-8 can't carry",
            "remove lone surrogates",
        ) from error
    if size > MAX_TURN_BYTES:
        raise RoostError(
            Reason.MESSAGE_TOO_LARGE,
            f"the message is {size} bytes long; at most {MAX_TURN_BYTES} are allowed",
            "send it in parts, or let the agent fetch it",
        )
    if not 0 < len(turn_id) <= _MAX_TURN_ID:
        raise RoostError(
            Reason.BAD_REQUEST,
            f"a turn id has 1 to {_MAX_TURN_ID} characters",
            "leave it out to get a new one",
        )


def _gave_up(error: RoostError, turn_id: str, timeout: float, left: float) -> RoostError:
    """What the person sees: errors that trying again can't help as they are, others with what was tried."""
    if error.remedy is Remedy.GIVE_UP:
        return error
    again = f"send it again with turn id {turn_id} to learn whether it was applied"
    return RoostError(
        error.reason,
        f"no reply within {timeout:g} s: {error.message}",
        f"{error.hint}; {again}" if error.hint else again,
    )
