"""Around every call of Roost's own services: is the coordinator ready, and what does an error become?"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn

import grpc
import grpc.aio

from shared.errors import Reason, RoostError

log = logging.getLogger(__name__)

UNARY_LIMIT = 10.0  # seconds that a call may take if its client gave no shorter deadline
_OURS = "/roost.v1."

Handler = Callable[[Any, Any], Any]


class Guard(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in its stubs only
    """RoostErrors become statuses with details. Anything else is a bug: INTERNAL, and a traceback in the log.

    `not_ready` says why calls can't be served yet, or None.
    """

    def __init__(self, not_ready: Callable[[], RoostError | None]) -> None:
        self._not_ready = not_ready

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not method.startswith(_OURS):
            return handler
        return _rewrapped(handler, lambda inner: self._guarded(inner, method, _is_unary(handler)))

    def _guarded(self, inner: Handler, method: str, unary: bool) -> Handler:
        async def call(request: Any, context: Any) -> Any:
            try:
                self._check()
                async with asyncio.timeout(_seconds(context) if unary else None):
                    return await inner(request, context)
            except Exception as error:
                await _end(error, method, context)

        async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
            try:
                self._check()
                async for reply in inner(request, context):
                    yield reply
            except Exception as error:
                await _end(error, method, context)

        return stream if inspect.isasyncgenfunction(inner) else call

    def _check(self) -> None:
        if error := self._not_ready():
            raise error


async def _end(error: Exception, method: str, context: Any) -> NoReturn:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if isinstance(error, TimeoutError):
        error = RoostError(Reason.DEADLINE, f"{method} did not finish in time", "try again")
    if not isinstance(error, RoostError):
        log.error("%s failed", method, exc_info=error)
        error = RoostError(
            Reason.INTERNAL,
            "the coordinator failed at this call",
            "its log has the details; please report it",
        )
    await error.abort(context)


def _seconds(context: Any) -> float:
    remaining = context.time_remaining()
    return UNARY_LIMIT if remaining is None else min(UNARY_LIMIT, max(0.0, float(remaining)))


def _is_unary(handler: Any) -> bool:
    return not handler.request_streaming and not handler.response_streaming


def _rewrapped(handler: Any, wrap: Callable[[Handler], Handler]) -> Any:
    kinds = {
        (False, False): (grpc.unary_unary_rpc_method_handler, handler.unary_unary),
        (False, True): (grpc.unary_stream_rpc_method_handler, handler.unary_stream),
        (True, False): (grpc.stream_unary_rpc_method_handler, handler.stream_unary),
        (True, True): (grpc.stream_stream_rpc_method_handler, handler.stream_stream),
    }
    make, inner = kinds[handler.request_streaming, handler.response_streaming]
    return make(wrap(inner), handler.request_deserializer, handler.response_serializer)
