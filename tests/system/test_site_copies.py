"""Nodes of one site keep copies of each other's state: for restores, and for a blob store that lost some."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import grpc.aio
import pytest

from protos.v1 import blobs_pb2, resolver_pb2, resolver_pb2_grpc, site_pb2_grpc
from roost.client import AsyncChat
from shared import peer_tickets, rpc
from shared.errors import Reason, from_rpc
from tests.support.eventually import eventually
from tests.support.mesh import AGENTS, NORTH, SOUTH, Mesh, running_mesh

ONE, TWO = replace(NORTH, site="lab"), replace(SOUTH, site="lab")
OSLO = (59.9, 10.7)
PROBE = AGENTS / "probe"


def chunks(directory: Path) -> set[str]:
    return {path.name for path in directory.rglob("*") if path.is_file() and len(path.name) == 64}


async def test_a_blob_store_that_lost_chunks_gets_them_back_from_a_peer_and_strangers_get_nothing(
    tmp_path: Path,
) -> None:
    async with running_mesh(tmp_path, [ONE, TWO]) as mesh:
        await mesh.deploy(PROBE)
        store, copies = tmp_path / "blobs" / "chunks", mesh.data_dir("edge-south") / "daemon" / "copies"
        agents = chunks(store)
        async with mesh.client(OSLO) as client, client.attach("probe", "ana") as ana:
            await ana.send("fill much 3")
            await ana.send("append one")
            await _strangers_get_nothing(mesh, ana)
            state = chunks(store) - agents
            assert len(state) > 10
            # But for the manifest of the version before, which nobody needs.
            await eventually(lambda: len(state - chunks(copies)) <= 1, 20.0, "copies on the peer")
            await asyncio.sleep(2.5)  # what came along with commits has been brought to the store by then
            for name in chunks(store) - agents:
                (store / name[:2] / name).unlink()
            await mesh.nodes["edge-north"].kill()
            reply = await ana.send("append two", timeout=40.0)
            assert (reply.receipt.node, reply.receipt.lost) == ("edge-south", ())
            assert json.loads(reply.text) == ["one", "two"]
            await eventually(lambda: len(state - chunks(store)) <= 1, 20.0, "the store has them again")
            assert "put back" in mesh.nodes["edge-south"].log()


async def _refused(mesh: Mesh, address: str, ticket: bytes | None) -> Reason:
    metadata = ((peer_tickets.METADATA, ticket),) if ticket is not None else ()
    async with rpc.channel(address) as channel:
        stub = site_pb2_grpc.SiteStub(channel)
        reasons = set()
        for call in (
            stub.Missing(blobs_pb2.MissingRequest(hashes=["ab" * 32]), timeout=5.0, metadata=metadata),
            stub.Put(iter([blobs_pb2.Blob(hash="ab" * 32, zstd=b"x")]), timeout=5.0, metadata=metadata),
            stub.Get(blobs_pb2.GetRequest(hashes=["ab" * 32]), timeout=5.0, metadata=metadata).read(),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            reasons.add(from_rpc(caught.value, Reason.NODE_UNREACHABLE, "it").reason)
    (reason,) = reasons
    return reason


async def _strangers_get_nothing(mesh: Mesh, ana: AsyncChat) -> None:
    request = resolver_pb2.ResolveRequest(key=ana.key.to_proto())
    async with rpc.channel(mesh.addresses[0]) as channel:
        place = await resolver_pb2_grpc.ResolverStub(channel).Resolve(request, timeout=5.0)
    for ticket in (None, b"", b"garbage", place.ticket):
        assert await _refused(mesh, place.address, ticket) is Reason.TICKET_INVALID
