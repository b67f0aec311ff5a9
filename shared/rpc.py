"""gRPC as everybody here uses it: sizes, keepalive, and how addresses are written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc.aio

API_VERSION = "v1"
MAX_TURN_BYTES = 1 << 20  # of a user's message and of an agent's reply, as UTF-8
_MAX_WIRE_BYTES = 8 << 20  # above any well-formed message, so that what is too large gets our own error

_COMMON: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", _MAX_WIRE_BYTES),
    ("grpc.max_send_message_length", _MAX_WIRE_BYTES),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]


def channel(address: str) -> grpc.aio.Channel:
    """A channel to `host:port` that notices a dead peer, tries again soon, and ignores HTTP proxies."""
    return grpc.aio.insecure_channel(
        address,
        options=[
            *_COMMON,
            ("grpc.enable_http_proxy", 0),
            ("grpc.initial_reconnect_backoff_ms", 100),
            # Despite its name: how long one attempt to connect may take. Less than a distant or busy peer
            # needs would make it unreachable for good.
            ("grpc.min_reconnect_backoff_ms", 3_000),
            ("grpc.max_reconnect_backoff_ms", 1_000),
        ],
    )


def server(interceptors: Sequence[grpc.aio.ServerInterceptor[Any, Any]] = ()) -> grpc.aio.Server:
    return grpc.aio.server(
        interceptors=interceptors,
        options=[
            *_COMMON,
            ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
            ("grpc.so_reuseport", 0),  # two daemons on one port is a mistake to be told of
        ],
    )


def bind(server: grpc.aio.Server, listen: str) -> str:
    """Binds `host:port` (port 0: any free one) and returns what was bound. OSError if it is taken."""
    try:
        port = server.add_insecure_port(listen)
    except RuntimeError as error:
        raise OSError(f"can't listen on {listen}: is the port taken?") from error
    return f"{listen.rpartition(':')[0]}:{port}"
