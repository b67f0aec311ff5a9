"""Real lines to real peers, on loopback: one that is gone is noticed at once."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_agent.site import SiteServicer
from edge_agent.state.chunks import ChunkStore
from edge_agent.state.peers import Peers
from protos.v1 import site_pb2, site_pb2_grpc
from shared import peer_tickets, rpc
from shared.content import Blob
from shared.errors import Reason, RoostError
from tests.support.etcd import free_ports

ONE, TWO = Blob.of(b"one"), Blob.of(b"two")


async def test_copies_go_to_a_peer_and_come_back_verified(tmp_path: Path) -> None:
    key = Ed25519PrivateKey.generate()
    own, copies = ChunkStore(tmp_path / "own"), ChunkStore(tmp_path / "copies")
    own.put(TWO)
    server = rpc.server()
    address = rpc.bind(server, "127.0.0.1:0")
    servicer = SiteServicer("b", "lab", lambda: [key.public_key()], own, copies)
    site_pb2_grpc.add_SiteServicer_to_server(servicer, server)
    await server.start()
    peers = Peers(None)

    def told(lifetime: float) -> None:
        ticket = peer_tickets.sign(peer_tickets.PeerTicket("a", "b", "lab", time.time() + lifetime), key)
        peers.told(site_pb2.SitePeers(peers=[site_pb2.SitePeer(node="b", address=address, ticket=ticket)]))

    try:
        told(60.0)
        (peer,) = peers.responsible("k")
        line = await peers.line(peer)
        assert await line.missing([ONE.hash, TWO.hash]) == {ONE.hash, TWO.hash}, "its own may go any time"
        await line.put([ONE])
        assert await line.missing([ONE.hash, TWO.hash]) == {TWO.hash}
        assert await line.get([ONE.hash, TWO.hash, "ab" * 32]) == {ONE.hash: ONE, TWO.hash: TWO}
        copies._path(ONE.hash).write_bytes(TWO.zstd)
        assert await line.get([ONE.hash]) == {}, "damaged: there is none"
        with pytest.raises(RoostError) as caught:
            await line.get(["../../etc/passwd"])
        assert caught.value.reason is Reason.BAD_REQUEST
        told(-1.0)
        with pytest.raises(RoostError) as caught:
            await (await peers.line(peers.responsible("k")[0])).get([ONE.hash])
        assert caught.value.reason is Reason.TICKET_EXPIRED
    finally:
        await peers.close()
        await server.stop(None)


async def test_what_refuses_connections_is_given_up_at_once() -> None:
    (port,) = free_ports(1)
    peers = Peers(None)
    peers.told(site_pb2.SitePeers(peers=[site_pb2.SitePeer(node="b", address=f"127.0.0.1:{port}")]))
    try:
        for _ in range(2):
            with pytest.raises(RoostError) as caught:
                await peers.line(peers.responsible("k")[0])
            assert caught.value.reason is Reason.NODE_UNREACHABLE
    finally:
        await peers.close()
