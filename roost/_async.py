"""The client with an event loop.

A turn gets its id once. Whatever fails on the way, the same turn is sent again under that id, to the node
that owns the instance by then, until it is committed or the turn's deadline has passed: it is applied once.
"""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc.aio

from protos.v1 import attach_pb2, common_pb2, resolver_pb2, resolver_pb2_grpc
from roost._mesh import Attachment, Coordinators, Place
from roost._turns import Failed, Failure, GiveUp, Progress, Refused, ResolveAgain, SendAgain, decide
from roost._types import Delta, Event, Reply, Restarted, Waiting
from roost._where import find_coordinators
from shared.errors import Reason, Remedy, RoostError
from shared.identity import InstanceKey
from shared.rpc import MAX_TURN_BYTES

TURN_TIMEOUT = 60.0  # seconds for a turn, all tries included
_MARGIN = 0.5  # seconds
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


@dataclass(slots=True)
class _Sending:
    """The turn under way. `sent`: over the attachment that there is. `may_run`: sent at all."""

    turn_id: str
    message: str
    cancel_if_left: bool
    cancelled: bool = False
    sent: bool = False
    may_run: bool = False
    cancelling: asyncio.Future[None] | None = None  # kept, so that it is not lost while it runs


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
        self._given: Reply | None = None  # the last one; what it says and is no longer so is lost
        self._sending: _Sending | None = None

    async def __aenter__(self) -> AsyncChat:
        return self

    async def __aexit__(self, *exc: Any) -> None:
        await self.close()

    async def close(self) -> None:
        attachment, self._attachment = self._attachment, None
        if attachment is not None:
            await attachment.close()

    def cancel(self) -> None:
        """Asks that the turn under way, if there is one, be cancelled, and returns at once. Its `send` or
        `stream` then ends with TURN_CANCELLED, the state as it was before; or as if nothing had been asked,
        if its commit had begun. If its node can't be reached, that takes until another has its state."""
        if self._sending is not None and not self._sending.cancelled:
            self._sending.cancelled = True
            if self._sending.sent and self._attachment is not None:
                cancel = self._attachment.cancel(self._sending.turn_id)
                self._sending.cancelling = asyncio.ensure_future(cancel)

    async def send(
        self,
        message: str,
        turn_id: str | None = None,
        timeout: float = TURN_TIMEOUT,
        cancel_if_left: bool = False,
    ) -> Reply:
        """The reply to `message`. To repeat a turn whose end is unknown, give its `turn_id` again.

        The turn has `timeout` seconds, all tries and waiting for other turns included. One that is cut off,
        or that nobody waits for any more, goes on to its end; with `cancel_if_left` it is cancelled when this
        call is.

        RoostError if the turn failed; its state is then as it was. After DEADLINE or a reason of its remedies
        RETRY and RESOLVE it may still be applied, and after RESTORE_INCOMPLETE or INTERNAL an earlier try may
        have been: send it again under the same id to find out.
        """
        async with aclosing(self.stream(message, turn_id, timeout, cancel_if_left)) as events:
            async for event in events:
                if isinstance(event, Reply):
                    return event
        raise AssertionError("a stream ends with a reply or an error")

    async def stream(
        self,
        message: str,
        turn_id: str | None = None,
        timeout: float = TURN_TIMEOUT,
        cancel_if_left: bool = False,
    ) -> AsyncGenerator[Event, None]:
        """As `send`, but yields Waiting while something takes long before the turn, each Delta as it comes,
        Restarted when those so far are void, and in the end the Reply, which alone is true. With
        `cancel_if_left` closing it before its end cancels the turn, too."""
        turn_id = uuid.uuid4().hex if turn_id is None else turn_id
        _check(message, turn_id)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        async with self._serial, self._one_turn(_Sending(turn_id, message, cancel_if_left)) as sending:
            progress = Progress()
            cause: Failed | None = None  # what a node last said of it
            while True:
                said = False
                failure: Failure | None = None
                attempt = self._attempt(sending, progress.exclude, deadline)
                async with aclosing(attempt) as events:
                    async for event in events:
                        match event:
                            case Waiting():
                                yield event
                            case Delta():
                                said = True
                                yield event
                            case Reply():
                                if not event.receipt.replayed:
                                    self._given = event
                                yield event
                                return
                            case Refused() | Failed():
                                failure = event
                assert failure is not None, "an attempt ends with a reply or a failure"
                cause = failure if isinstance(failure, Failed) else cause
                progress, step = decide(progress, failure, deadline - loop.time())
                match step:
                    case GiveUp(error):
                        raise _gave_up(_explained(error, cause), turn_id, timeout)
                    case ResolveAgain(pause):
                        await self.close()
                    case SendAgain(pause):
                        pass
                if said:
                    yield Restarted()
                await asyncio.sleep(pause * random.uniform(0.5, 1.0))

    @asynccontextmanager
    async def _one_turn(self, sending: _Sending) -> AsyncIterator[_Sending]:
        self._sending = sending
        try:
            yield sending
        finally:
            self._sending = None

    async def _attempt(
        self, sending: _Sending, exclude: frozenset[str], deadline: float
    ) -> AsyncGenerator[Waiting | Delta | Reply | Failure, None]:
        """One try: resolve and attach if need be, then the turn. Ends with a Reply or a Failure."""
        loop = asyncio.get_running_loop()
        place = self._attachment.place if self._attachment is not None else None
        try:
            if place is None:
                place = await self._resolve(exclude, deadline - loop.time())
            attachment = await self._send(place, sending, deadline)
            replies = attachment.replies(sending.turn_id, deadline - loop.time(), sending.cancel_if_left)
            async with aclosing(replies) as events:
                async for event in events:
                    yield event
        except RoostError as error:
            yield Refused(error) if place is None else Failed(place.node, error)
        finally:
            sending.sent = False

    async def _send(self, place: Place, sending: _Sending, deadline: float) -> Attachment:
        """Over the stream that there is, or else over a new one. If it was sent before it may be under way,
        or committed: then a cancellation follows it, and the node knows which."""
        loop = asyncio.get_running_loop()
        if sending.cancelled and not sending.may_run:
            raise RoostError(Reason.TURN_CANCELLED, "the turn was cancelled before it was sent")
        turn = self._turn(sending, deadline - loop.time())
        if self._attachment is None or not await self._attachment.send(turn):
            await self.close()
            self._attachment = await Attachment.open(place, deadline - loop.time())
            await self._attachment.send(turn)  # should it break: reading says so
        sending.sent = sending.may_run = True
        if sending.cancelled:
            await self._attachment.cancel(sending.turn_id)
        return self._attachment

    def _turn(self, sending: _Sending, left: float) -> attach_pb2.Turn:
        # A little less than this side waits, so that the node's word on it still gets here in time.
        node_has = left - min(_MARGIN, left / 10)
        turn = attach_pb2.Turn(
            id=sending.turn_id, message=sending.message, deadline_ms=max(1, round(node_has * 1000))
        )
        if (given := self._given) is not None:
            turn.given.turn_id = given.turn_id
            turn.given.node = given.receipt.node
            turn.given.version = given.receipt.version
            turn.given.durable = given.receipt.durable
        return turn

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


def _explained(error: RoostError, cause: Failed | None) -> RoostError:
    """That no node is left to ask is the coordinators' word; why none could do it, the last node's."""
    if cause is None or error.reason not in (Reason.NO_ROOM, Reason.NODE_UNREACHABLE) or error is cause.error:
        return error
    said = cause.error
    return RoostError(
        error.reason, f"{error.message}; {cause.node} had said: {said.message}", said.hint or error.hint
    )


def _gave_up(error: RoostError, turn_id: str, timeout: float) -> RoostError:
    """What the person sees: errors that trying again can't help as they are, others with what was tried."""
    if error.remedy is Remedy.GIVE_UP:
        return error
    again = f"send it again with turn id {turn_id} to learn whether it was applied"
    return RoostError(
        error.reason,
        f"no reply within {timeout:g} s: {error.message}",
        f"{error.hint}; {again}" if error.hint else again,
    )
