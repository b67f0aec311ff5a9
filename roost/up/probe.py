"""Does a process of `roost up` serve? Asked as a client would ask, so that ready means usable."""

from __future__ import annotations

import asyncio

import grpc.aio

from protos.v1 import admin_pb2, admin_pb2_grpc
from roost.up.layout import NODES, Process
from shared import rpc

_TIMEOUT = 2.0  # seconds for one look
_NODE_NAMES = frozenset(node.name for node in NODES)


class MeshProbe:
    """Etcd serves when it says so; the coordinator when it can tell its status, which needs etcd; a node when
    the coordinator at `coordinator` says that it is up."""

    def __init__(self, coordinator: str) -> None:
        self._channel = rpc.channel(coordinator)

    async def serves(self, process: Process) -> bool:
        if process.name == "etcd":
            return await _etcd_is_healthy(process.address)
        try:
            status = await admin_pb2_grpc.AdminStub(self._channel).Status(
                admin_pb2.StatusRequest(), timeout=_TIMEOUT
            )
        except grpc.aio.AioRpcError:
            return False
        up = {node.node.id for node in status.nodes if node.state == "up"}
        return process.name in up or process.name not in _NODE_NAMES

    async def close(self) -> None:
        await self._channel.close(None)


async def _etcd_is_healthy(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        async with asyncio.timeout(_TIMEOUT):
            reader, writer = await asyncio.open_connection(host, int(port))
            try:
                writer.write(b"GET /health HTTP/1.0\r\n\r\n")
                return b'"health":"true"' in await reader.read()
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return False
