"""The coordinator's blob service in this process, over real gRPC, and a node's view of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc.aio

from coordinator.blobs import BlobsServicer, BlobStore
from edge_agent.state.blobs import GrpcBlobs
from protos.v1 import blobs_pb2_grpc


@asynccontextmanager
async def serving(store: BlobStore) -> AsyncIterator[tuple[grpc.aio.Server, GrpcBlobs]]:
    server = grpc.aio.server()
    blobs_pb2_grpc.add_BlobsServicer_to_server(BlobsServicer(store), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield server, GrpcBlobs(channel, timeout=30)
    await server.stop(None)
