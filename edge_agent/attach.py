"""The gRPC face to users' programs: checks the ticket, then carries turns, one after another."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import grpc.aio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from edge_agent.instance import Instance
from edge_agent.losses import Given, lost
from edge_agent.supervisor import Supervisor
from edge_agent.turns import Note, Turn
from edge_agent.under_way import UnderWay
from protos.v1 import attach_pb2, attach_pb2_grpc, common_pb2
from shared.errors import Reason, RoostError
from shared.identity import verify_ticket
from shared.rpc import MAX_TURN_BYTES

log = logging.getLogger(__name__)

_MAX_TURN_ID = 128
_MAX_SENT = 16  # turns on one stream that wait for their answer
_HELLO_SECONDS = 5.0
_HINT = "protos/v1/attach.proto says what is sent when"

_Context = grpc.aio.ServicerContext[attach_pb2.AttachRequest, attach_pb2.AttachReply]
_Replies = AsyncIterator[attach_pb2.AttachReply]


class AttachServicer(attach_pb2_grpc.AttachServicer):
    def __init__(
        self, node: str, supervisor: Supervisor, ticket_keys: Callable[[], Sequence[Ed25519PublicKey]]
    ) -> None:
        self._node = node
        self._supervisor = supervisor
        self._ticket_keys = ticket_keys

    async def Attach(self, requests: AsyncIterator[attach_pb2.AttachRequest], context: _Context) -> _Replies:
        try:
            async for reply in self._attach(requests):
                yield reply
        except RoostError as error:
            await error.abort(context)
        except Exception:
            log.exception("a bug while an instance was attached to")
            await RoostError(Reason.INTERNAL, f"node {self._node} failed; its log says how").abort(context)

    async def _attach(self, requests: AsyncIterator[attach_pb2.AttachRequest]) -> _Replies:
        try:
            async with asyncio.timeout(_HELLO_SECONDS):
                first = await anext(aiter(requests), None)
        except TimeoutError as error:
            raise RoostError(Reason.DEADLINE, f"no hello came within {_HELLO_SECONDS:g} s", _HINT) from error
        if first is None or not first.HasField("hello"):
            raise RoostError(Reason.BAD_REQUEST, "an attach stream begins with a hello", _HINT)
        # First, because a node that has no link yet knows no keys either.
        self._supervisor.check_serving()
        ticket = verify_ticket(first.hello.ticket, self._ticket_keys(), self._node, time.time())
        async with self._supervisor.attached(ticket) as instance:
            yield attach_pb2.AttachReply(attached=attach_pb2.Attached(node=self._node, epoch=instance.epoch))
            inbox = _Inbox(requests, lambda request: self._begin(instance, request))
            try:
                while (sent := await inbox.next()) is not None:
                    async for reply in _answers(instance, sent):
                        yield reply
            finally:
                inbox.close()

    def _begin(self, instance: Instance, request: attach_pb2.Turn) -> UnderWay:
        _check(request)
        patience = request.deadline_ms / 1000 or math.inf
        return self._supervisor.begin(
            instance, Turn(request.id, instance.key.user, request.message), patience
        )


@dataclass(frozen=True, slots=True)
class _Sent:
    """A turn that this client sent: under way, or refused."""

    request: attach_pb2.Turn
    turn: UnderWay | RoostError


class _Inbox:
    """What one client sends, read beside the answers that it gets: so a turn can be cancelled, and the time
    it has counts from its arrival. A client that sends many turns at once is read no faster than it is
    answered."""

    def __init__(
        self,
        requests: AsyncIterator[attach_pb2.AttachRequest],
        begin: Callable[[attach_pb2.Turn], UnderWay],
    ) -> None:
        self._begin = begin
        self._arrived: asyncio.Queue[_Sent | Exception | None] = asyncio.Queue(_MAX_SENT)
        self._unanswered: dict[str, UnderWay] = {}
        self._last = ""  # id of the turn that is being answered
        self._reading = asyncio.create_task(self._read(requests), name="read an attach stream")

    async def next(self) -> _Sent | None:
        """The next turn, when the one before has been answered. None: there will be no more. Raises what made
        the stream unreadable."""
        self._unanswered.pop(self._last, None)
        arrived = await self._arrived.get()
        if isinstance(arrived, Exception):
            raise arrived
        if arrived is not None:
            self._last = arrived.request.id
        return arrived

    def close(self) -> None:
        self._reading.cancel()

    async def _read(self, requests: AsyncIterator[attach_pb2.AttachRequest]) -> None:
        try:
            async for request in requests:
                match request.WhichOneof("kind"):
                    case "turn":
                        await self._arrived.put(self._sent(request.turn))
                    case "cancel":
                        if turn := self._unanswered.get(request.cancel.turn_id):
                            turn.cancel()
                    case _:
                        await self._arrived.put(_unknown())
                        return
            await self._arrived.put(None)
        except Exception as error:
            await self._arrived.put(error)

    def _sent(self, request: attach_pb2.Turn) -> _Sent:
        try:
            turn = self._begin(request)
        except RoostError as error:
            return _Sent(request, error)
        self._unanswered[request.id] = turn
        return _Sent(request, turn)


async def _answers(instance: Instance, sent: _Sent) -> _Replies:
    turn_id = sent.request.id
    try:
        if isinstance(sent.turn, RoostError):
            raise sent.turn
        async with aclosing(sent.turn.deltas.listen()) as said:
            async for piece in said:
                if isinstance(piece, Note):
                    yield attach_pb2.AttachReply(waiting=attach_pb2.Waiting(turn_id=turn_id, text=piece.text))
                else:
                    yield attach_pb2.AttachReply(delta=attach_pb2.Delta(turn_id=turn_id, text=piece))
        done = await sent.turn.outcome()
    except RoostError as error:
        log.info("%s turn %s: %s: %s", instance.key, turn_id, error.reason, error.message)
        yield attach_pb2.AttachReply(failed=attach_pb2.TurnFailed(turn_id=turn_id, error=error.to_proto()))
        return
    receipt = common_pb2.Receipt()
    receipt.CopyFrom(done.receipt)  # which other clients may be given, too
    given = Given.from_proto(sent.request.given) if sent.request.HasField("given") else None
    receipt.lost.extend(lost(given, done.built_on))
    yield attach_pb2.AttachReply(
        committed=attach_pb2.Committed(turn_id=turn_id, reply=done.reply, receipt=receipt)
    )


def _unknown() -> RoostError:
    return RoostError(
        Reason.BAD_REQUEST, "after its hello, an attach stream holds only turns, and what cancels them", _HINT
    )


def _check(turn: attach_pb2.Turn) -> None:
    if not turn.id or len(turn.id) > _MAX_TURN_ID:
        raise RoostError(
            Reason.BAD_REQUEST,
            f"a turn's id has 1 to {_MAX_TURN_ID} characters",
            "choose a new random one, such as a UUID, for each message",
        )
    size = len(turn.message.encode())
    if size > MAX_TURN_BYTES:
        raise RoostError(
            Reason.MESSAGE_TOO_LARGE,
            f"the message has {size} bytes; the limit is {MAX_TURN_BYTES}",
            "send less at once",
        )
