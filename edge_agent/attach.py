"""The gRPC face to users' programs: checks the ticket, then carries turns, one after another."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence

import grpc.aio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from edge_agent.instance import Instance
from edge_agent.phases import Done
from edge_agent.supervisor import Supervisor
from edge_agent.turns import Deltas, Turn
from protos.v1 import attach_pb2, attach_pb2_grpc
from shared.errors import Reason, RoostError
from shared.identity import verify_ticket
from shared.rpc import MAX_TURN_BYTES

log = logging.getLogger(__name__)

_MAX_TURN_ID = 128
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
            async for request in requests:
                if not request.HasField("turn"):
                    raise RoostError(
                        Reason.BAD_REQUEST, "after its hello, an attach stream holds only turns", _HINT
                    )
                async for reply in self._turn(instance, request.turn):
                    yield reply

    async def _turn(self, instance: Instance, request: attach_pb2.Turn) -> _Replies:
        deltas = Deltas()
        try:
            _check(request)
            task = self._supervisor.begin(
                instance, Turn(request.id, instance.key.user, request.message), deltas
            )
            while (text := await deltas.next()) is not None:
                yield attach_pb2.AttachReply(delta=attach_pb2.Delta(turn_id=request.id, text=text))
            done = await _outcome(task, self._node)
        except RoostError as error:
            log.info("%s turn %s: %s: %s", instance.key, request.id, error.reason, error.message)
            yield attach_pb2.AttachReply(
                failed=attach_pb2.TurnFailed(turn_id=request.id, error=error.to_proto())
            )
            return
        yield attach_pb2.AttachReply(
            committed=attach_pb2.Committed(turn_id=request.id, reply=done.reply, receipt=done.receipt)
        )


async def _outcome(task: asyncio.Task[Done], node: str) -> Done:
    """The turn's. It goes on if the client leaves; if the node stops in the midst of it, that is said."""
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        if not task.cancelled():
            raise
        raise RoostError(
            Reason.TURN_NOT_COMMITTED,
            f"node {node} stopped before the turn was certainly committed",
            "send it again under the same id: it is applied once",
        ) from None


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
