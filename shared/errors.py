"""Errors with a message, a hint for a person and a reason for a machine.

One table says of every reason which gRPC status it travels as and what a client should do about it.
On the wire an error is a `google.rpc.Status` with an `ErrorInfo` (the field's standard), in the
`grpc-status-details-bin` trailer; inside a stream that goes on it is a `roost.v1.Error`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import Enum, StrEnum, auto
from typing import Any, NoReturn, cast

import grpc
import grpc.aio
from google.rpc import error_details_pb2, status_pb2

from protos.v1 import errors_pb2

_DETAILS = "grpc-status-details-bin"
_DOMAIN = "roost"


class Remedy(Enum):
    """What a client should do after an error."""

    GIVE_UP = auto()  # asking again can't help
    RETRY = auto()  # the same call, a little later
    RESOLVE = auto()  # resolve again: another node, or another ticket


class Reason(StrEnum):
    """The names of `roost.v1.Reason`."""

    @staticmethod
    def _generate_next_value_(name: str, start: int, count: int, last_values: list[str]) -> str:
        return name

    INTERNAL = auto()
    BAD_REQUEST = auto()
    MESSAGE_TOO_LARGE = auto()
    DEADLINE = auto()
    AGENT_UNKNOWN = auto()
    AGENT_INVALID = auto()
    AGENT_PREPARE_FAILED = auto()
    AGENT_START_FAILED = auto()
    AGENT_CRASHED = auto()
    AGENT_OUT_OF_MEMORY = auto()
    TURN_FAILED = auto()
    TURN_TIMEOUT = auto()
    TURN_NOT_COMMITTED = auto()
    TURN_REPLY_GONE = auto()
    TICKET_INVALID = auto()
    TICKET_EXPIRED = auto()
    TICKET_WRONG_NODE = auto()
    EPOCH_STALE = auto()
    NODE_FULL = auto()
    NODE_SUSPENDED = auto()
    NODE_UNKNOWN = auto()
    NODE_UNREACHABLE = auto()
    NODE_STOPPING = auto()
    NO_ROOM = auto()
    NODE_FAILED = auto()
    MOVE_GIVEN_UP = auto()
    STORE_UNAVAILABLE = auto()
    COORDINATOR_UNREACHABLE = auto()
    BLOB_MISSING = auto()
    BLOB_CORRUPT = auto()
    BLOBS_UNAVAILABLE = auto()
    RESTORE_INCOMPLETE = auto()
    STATE_TOO_LARGE = auto()
    TENANT_QUOTA = auto()
    UPLOAD_STALE = auto()
    STATE_CHANGED = auto()
    VERSION_GONE = auto()
    COLLECTING = auto()
    JAIL_FAILED = auto()
    EFFECT_UNCERTAIN = auto()
    EFFECT_MISMATCH = auto()
    EFFECT_LIMIT = auto()
    TIMER_LIMIT = auto()
    TURN_CANCELLED = auto()
    TURN_DEADLINE = auto()


_Code = grpc.StatusCode
_GIVE_UP, _RETRY, _RESOLVE = Remedy.GIVE_UP, Remedy.RETRY, Remedy.RESOLVE

_TABLE: dict[Reason, tuple[grpc.StatusCode, Remedy]] = {
    Reason.INTERNAL: (_Code.INTERNAL, _GIVE_UP),
    Reason.BAD_REQUEST: (_Code.INVALID_ARGUMENT, _GIVE_UP),
    Reason.MESSAGE_TOO_LARGE: (_Code.INVALID_ARGUMENT, _GIVE_UP),
    Reason.DEADLINE: (_Code.DEADLINE_EXCEEDED, _RETRY),
    Reason.AGENT_UNKNOWN: (_Code.NOT_FOUND, _GIVE_UP),
    Reason.AGENT_INVALID: (_Code.INVALID_ARGUMENT, _GIVE_UP),
    Reason.AGENT_PREPARE_FAILED: (_Code.FAILED_PRECONDITION, _GIVE_UP),
    Reason.AGENT_START_FAILED: (_Code.FAILED_PRECONDITION, _GIVE_UP),
    Reason.AGENT_CRASHED: (_Code.ABORTED, _GIVE_UP),
    Reason.AGENT_OUT_OF_MEMORY: (_Code.ABORTED, _GIVE_UP),
    Reason.TURN_FAILED: (_Code.ABORTED, _GIVE_UP),
    Reason.TURN_TIMEOUT: (_Code.DEADLINE_EXCEEDED, _GIVE_UP),
    Reason.TURN_NOT_COMMITTED: (_Code.UNAVAILABLE, _RESOLVE),
    Reason.TURN_REPLY_GONE: (_Code.ALREADY_EXISTS, _GIVE_UP),
    Reason.TICKET_INVALID: (_Code.UNAUTHENTICATED, _GIVE_UP),
    Reason.TICKET_EXPIRED: (_Code.UNAUTHENTICATED, _RESOLVE),
    Reason.TICKET_WRONG_NODE: (_Code.PERMISSION_DENIED, _RESOLVE),
    Reason.EPOCH_STALE: (_Code.FAILED_PRECONDITION, _RESOLVE),
    Reason.NODE_FULL: (_Code.RESOURCE_EXHAUSTED, _RESOLVE),
    Reason.NODE_SUSPENDED: (_Code.UNAVAILABLE, _RESOLVE),
    Reason.NODE_UNKNOWN: (_Code.NOT_FOUND, _GIVE_UP),
    Reason.NODE_UNREACHABLE: (_Code.UNAVAILABLE, _RESOLVE),
    Reason.NODE_STOPPING: (_Code.UNAVAILABLE, _RESOLVE),
    Reason.NO_ROOM: (_Code.RESOURCE_EXHAUSTED, _RETRY),
    Reason.NODE_FAILED: (_Code.UNAVAILABLE, _RESOLVE),  # its disk is full or broken
    Reason.MOVE_GIVEN_UP: (_Code.ABORTED, _RETRY),
    Reason.STORE_UNAVAILABLE: (_Code.UNAVAILABLE, _RETRY),
    Reason.COORDINATOR_UNREACHABLE: (_Code.UNAVAILABLE, _RETRY),
    Reason.BLOB_MISSING: (_Code.NOT_FOUND, _GIVE_UP),
    Reason.BLOB_CORRUPT: (_Code.DATA_LOSS, _GIVE_UP),
    Reason.BLOBS_UNAVAILABLE: (_Code.UNAVAILABLE, _RETRY),
    Reason.RESTORE_INCOMPLETE: (_Code.DATA_LOSS, _GIVE_UP),
    Reason.STATE_TOO_LARGE: (_Code.OUT_OF_RANGE, _GIVE_UP),
    Reason.TENANT_QUOTA: (_Code.RESOURCE_EXHAUSTED, _GIVE_UP),
    Reason.UPLOAD_STALE: (_Code.ABORTED, _GIVE_UP),  # what was put must be looked at again first
    Reason.STATE_CHANGED: (_Code.ABORTED, _RETRY),
    Reason.VERSION_GONE: (_Code.NOT_FOUND, _GIVE_UP),
    Reason.COLLECTING: (_Code.UNAVAILABLE, _RETRY),
    Reason.JAIL_FAILED: (_Code.INTERNAL, _RESOLVE),
    Reason.EFFECT_UNCERTAIN: (_Code.FAILED_PRECONDITION, _GIVE_UP),  # a person has to say what happened
    Reason.EFFECT_MISMATCH: (_Code.FAILED_PRECONDITION, _GIVE_UP),
    Reason.EFFECT_LIMIT: (_Code.RESOURCE_EXHAUSTED, _GIVE_UP),
    Reason.TIMER_LIMIT: (_Code.RESOURCE_EXHAUSTED, _GIVE_UP),
    Reason.TURN_CANCELLED: (_Code.CANCELLED, _GIVE_UP),
    Reason.TURN_DEADLINE: (_Code.DEADLINE_EXCEEDED, _GIVE_UP),
}


class RoostError(Exception):
    """An error that somebody can act upon. `message` says what is wrong, `hint` what to do."""

    def __init__(self, reason: Reason, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.hint = hint

    def __repr__(self) -> str:
        return f"RoostError({self.reason}, {self.message!r})"

    @property
    def code(self) -> grpc.StatusCode:
        return _TABLE[self.reason][0]

    @property
    def remedy(self) -> Remedy:
        return _TABLE[self.reason][1]

    # --- inside a stream ---------------------------------------------------------------------

    def to_proto(self) -> errors_pb2.Error:
        number = errors_pb2.Reason.Value(self.reason.value)
        return errors_pb2.Error(reason=number, message=self.message, hint=self.hint)

    @classmethod
    def from_proto(cls, error: errors_pb2.Error) -> RoostError:
        return cls(_reason_of(errors_pb2.Reason.Name(error.reason)), error.message, error.hint)

    # --- at the end of a call ----------------------------------------------------------------

    def trailers(self) -> tuple[tuple[str, bytes], ...]:
        status = status_pb2.Status(code=self.code.value[0], message=self.message)
        info = error_details_pb2.ErrorInfo(reason=self.reason.value, domain=_DOMAIN)
        if self.hint:
            info.metadata["hint"] = self.hint
        status.details.add().Pack(info)
        return ((_DETAILS, status.SerializeToString()),)

    async def abort(self, context: grpc.aio.ServicerContext[Any, Any]) -> NoReturn:
        """Ends the call that `context` serves with this error."""
        await context.abort(self.code, self.message, self.trailers())
        raise AssertionError("abort returned")


def _reason_of(name: str) -> Reason:
    try:
        return Reason(name)
    except ValueError:  # a newer peer's reason: keep its text, lose only the remedy
        return Reason.INTERNAL


@contextmanager
def translated(unreachable: Reason, peer: str) -> Iterator[None]:
    """RoostErrors for what a call in the block ends with.

    A call whose channel is closed under it raises CancelledError, though nobody cancelled the task: to the
    caller that is a peer that went away, and must not look like the end of the task.
    """
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise from_rpc(error, unreachable, peer) from error
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise RoostError(unreachable, f"the connection to {peer} was closed") from error


def from_rpc(error: grpc.aio.AioRpcError, unreachable: Reason, peer: str) -> RoostError:
    """What a failed call means. `unreachable` is the reason when `peer` gave no answer at all."""
    metadata = cast("Iterable[tuple[str, str | bytes]]", error.trailing_metadata() or ())
    for key, value in metadata:
        if key == _DETAILS and isinstance(value, bytes):
            status = status_pb2.Status.FromString(value)
            for detail in status.details:
                info = error_details_pb2.ErrorInfo()
                if detail.Unpack(info) and info.domain == _DOMAIN:
                    return RoostError(_reason_of(info.reason), status.message, info.metadata.get("hint", ""))
    detail_text = error.details() or error.code().name
    match error.code():
        case _Code.UNAVAILABLE | _Code.CANCELLED:
            return RoostError(unreachable, f"{peer} can't be reached: {detail_text}")
        case _Code.DEADLINE_EXCEEDED:
            return RoostError(unreachable, f"{peer} did not answer in time")
        case _Code.RESOURCE_EXHAUSTED if "message larger than max" in detail_text.lower():
            return RoostError(Reason.MESSAGE_TOO_LARGE, f"the message is too large: {detail_text}")
        case _Code.UNIMPLEMENTED:
            return RoostError(Reason.BAD_REQUEST, f"{peer} does not know this call", "is it a newer version?")
        case _:
            return RoostError(Reason.INTERNAL, f"{peer} failed: {detail_text}")
