"""Chunks come from the nearest place that has them whole, and the blob store gets back what it lost."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_agent.copier import Copier
from edge_agent.state.blobs import MemoryBlobs
from edge_agent.state.bundles import BundleStore
from edge_agent.state.chunks import ChunkStore
from edge_agent.state.copies import CopyStore
from edge_agent.state.peers import Asked, Peer, Peers, SiteBlobs
from edge_agent.state.store import StateStore
from protos.v1 import site_pb2
from shared import peer_tickets
from shared.content import Blob
from shared.errors import Reason, RoostError
from shared.identity import InstanceKey, Ticket, sign_ticket
from shared.manifest import FileNode, StateManifest, encode

KEY = InstanceKey("acme", "chef", "ana")
ONE, TWO, THREE = (Blob.of(text) for text in (b"one", b"two", b"three"))


@dataclass
class Line:
    """A peer that answers, or is `down`."""

    kept: dict[str, Blob] = field(default_factory=dict)
    down: bool = False
    asked: int = 0

    def _check(self) -> None:
        self.asked += 1
        if self.down:
            raise RoostError(Reason.NODE_UNREACHABLE, "down")

    async def missing(self, hashes: Sequence[str]) -> set[str]:
        self._check()
        return {hash for hash in hashes if hash not in self.kept}

    async def put(self, blobs: Sequence[Blob]) -> None:
        self._check()
        self.kept |= {blob.hash: blob for blob in blobs}

    async def get(self, hashes: Sequence[str]) -> dict[str, Blob]:
        self._check()
        return {hash: self.kept[hash] for hash in hashes if hash in self.kept}


class Lines(Peers):
    def __init__(self, heard: Sequence[str] | None = None, **lines: Line) -> None:
        self.now = 0.0
        super().__init__(None if heard is None else lambda: heard, lambda: self.now)
        self.lines = lines
        self.told(site_pb2.SitePeers(peers=[site_pb2.SitePeer(node=n, address=f"{n}:1") for n in lines]))

    async def line(self, peer: Peer) -> Asked:
        return self.lines[peer.node]


def having(*blobs: Blob) -> Line:
    return Line({blob.hash: blob for blob in blobs})


async def store_with(*blobs: Blob) -> MemoryBlobs:
    store = MemoryBlobs()
    await store.put(blobs)
    return store


def hashes(*blobs: Blob) -> list[str]:
    return [blob.hash for blob in blobs]


async def test_own_copies_first_then_peers_then_the_blob_store(tmp_path: Path) -> None:
    copies = ChunkStore(tmp_path)
    copies.put(ONE)
    lines = Lines(b=having(ONE, TWO))
    store = await store_with(THREE)  # and nothing else
    blobs = SiteBlobs(store, copies, lines)
    found = await blobs.get(hashes(ONE, TWO, THREE))
    assert list(found.values()) == [ONE, TWO, THREE]
    lines.lines["b"].asked = 0
    await blobs.get(hashes(ONE))
    assert lines.lines["b"].asked == 0
    assert set(blobs.lacking) == {ONE.hash, TWO.hash}, "to be looked for in the blob store"


async def test_a_peer_that_fails_costs_one_try_and_is_left_alone_for_a_while(tmp_path: Path) -> None:
    lines = Lines(b=Line(down=True))
    blobs = SiteBlobs(await store_with(ONE), ChunkStore(tmp_path), lines)
    for _ in range(3):
        assert await blobs.get(hashes(ONE)) == {ONE.hash: ONE}
    assert lines.lines["b"].asked == 1
    lines.now = 60.0
    await blobs.get(hashes(ONE))
    assert lines.lines["b"].asked == 2


async def test_who_can_not_be_heard_is_not_asked_unless_mdns_is_off(tmp_path: Path) -> None:
    store = await store_with(ONE)
    for heard, asked in ((["b"], 1), ([], 0), (None, 1)):
        lines = Lines(heard, b=having(ONE))
        await SiteBlobs(store, ChunkStore(tmp_path), lines).get(hashes(ONE))
        assert lines.lines["b"].asked == asked


async def test_what_the_blob_store_lost_or_damaged_is_had_from_any_peer(tmp_path: Path) -> None:
    many = {f"n{i}": Line() for i in range(9)}
    lines = Lines(None, **many)
    last = lines.responsible("")[-1]
    many[last.node].kept[TWO.hash] = TWO  # none of those that are asked first
    for damaged in (False, True):
        store = await store_with(ONE, *([TWO] if damaged else []))
        if damaged:
            store.kept[TWO.hash] = store.kept[ONE.hash]
        blobs = SiteBlobs(store, ChunkStore(tmp_path), lines)
        assert await blobs.get(hashes(ONE, TWO)) == {ONE.hash: ONE, TWO.hash: TWO}
        assert blobs.lacking == {TWO.hash: True}
    blobs = SiteBlobs(await store_with(), ChunkStore(tmp_path), lines)
    with pytest.raises(RoostError) as caught:
        await blobs.get(hashes(TWO, THREE))
    assert caught.value.reason is Reason.BLOB_MISSING


async def test_a_blob_store_that_is_down_is_not_needed_for_what_peers_have(tmp_path: Path) -> None:
    store = MemoryBlobs()
    store.down = True
    blobs = SiteBlobs(store, ChunkStore(tmp_path), Lines(b=having(ONE)))
    assert await blobs.get(hashes(ONE)) == {ONE.hash: ONE}
    with pytest.raises(RoostError) as caught:
        await blobs.get(hashes(ONE, TWO))
    assert caught.value.reason is Reason.BLOBS_UNAVAILABLE
    assert blobs.lacking == {ONE.hash: False}, "nobody said that it lacks them"


# --- the copier --------------------------------------------------------------------------------------


class Bench:
    def __init__(self, directory: Path, lines: Lines, copies: int = 1) -> None:
        self.store = MemoryBlobs()
        self.chunks = ChunkStore(directory / "chunks")
        self.blobs = SiteBlobs(self.store, ChunkStore(directory / "copies"), lines)
        state = StateStore(self.chunks, self.blobs, BundleStore(directory / "b", self.chunks, self.blobs))
        self.copier = Copier(state, self.blobs, lines, copies, bandwidth=1 << 30)

    def commit(self, version: int, *blobs: Blob) -> None:
        size = sum(len(blob.plain) for blob in blobs)
        file = FileNode("f", 0o600, 0, size, tuple(blob.hash for blob in blobs))
        encoded = encode(StateManifest(str(KEY), 1, version, (file,)))
        for blob in (*blobs, *map(Blob.of, encoded.blobs.values())):
            self.chunks.put(blob)
        self.copier.offer(KEY, version, encoded.root)


async def test_after_a_commit_one_peer_gets_what_it_has_not(tmp_path: Path) -> None:
    lines = Lines(b=Line(), c=Line())
    bench = Bench(tmp_path, lines)
    bench.commit(1, ONE, TWO)
    await bench.copier.reconcile()
    first, second = (lines.lines[p.node] for p in lines.responsible(str(KEY)))
    assert {ONE.hash, TWO.hash} < set(first.kept)
    assert len(first.kept) == 3, "and the manifest"
    assert not second.kept
    bench.commit(2, ONE, THREE)
    await bench.copier.reconcile()
    assert THREE.hash in first.kept
    assert len(first.kept) == 5


async def test_a_version_waits_for_a_peer_and_a_newer_one_replaces_it(tmp_path: Path) -> None:
    lines = Lines(b=Line(down=True))
    bench = Bench(tmp_path, lines)
    bench.commit(1, ONE)
    await bench.copier.reconcile()
    bench.commit(2, TWO)
    lines.lines["b"].down = False
    await bench.copier.reconcile()
    assert not lines.lines["b"].kept, "it just failed"
    lines.now = 60.0
    await bench.copier.reconcile()
    assert TWO.hash in lines.lines["b"].kept
    assert ONE.hash not in lines.lines["b"].kept


async def test_no_copies_are_made_if_none_are_wanted(tmp_path: Path) -> None:
    lines = Lines(b=Line())
    bench = Bench(tmp_path, lines, copies=0)
    bench.commit(1, ONE)
    await bench.copier.reconcile()
    assert lines.lines["b"].asked == 0


async def test_what_the_blob_store_lacks_is_put_back(tmp_path: Path) -> None:
    lines = Lines(b=having(ONE, TWO))
    bench = Bench(tmp_path, lines)
    await bench.store.put([TWO])
    found = await bench.blobs.get(hashes(ONE, TWO))
    for blob in found.values():
        bench.chunks.put(blob)  # as whoever restores does
    await bench.copier.reconcile()
    assert bench.store.kept == {ONE.hash: ONE.zstd, TWO.hash: TWO.zstd}
    assert not bench.blobs.lacking


# --- copies on this disk -----------------------------------------------------------------------------


def test_copies_take_no_more_than_their_share_and_the_least_asked_for_goes(tmp_path: Path) -> None:
    blobs = [Blob.of(os.urandom(1000)) for _ in range(20)]
    size = len(blobs[0].zstd)
    copies = CopyStore(tmp_path, 10 * size)
    for at, blob in enumerate(blobs[:10]):
        copies.put(blob)
        os.utime(copies._path(blob.hash), (at, at))
    assert copies.get(blobs[0].hash) == blobs[0], "now the newest"
    for blob in blobs[10:]:
        copies.put(blob)
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert sum(path.stat().st_size for path in files) <= 10 * size
    assert copies.get(blobs[1].hash) is None
    again = CopyStore(tmp_path, 5 * size)
    again.put(ONE)
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) <= 5
    assert again.get(ONE.hash) == ONE
    nothing = CopyStore(tmp_path / "none", 0)
    nothing.put(ONE)
    assert nothing.get(ONE.hash) is None


# --- tickets -----------------------------------------------------------------------------------------


def test_a_ticket_is_for_one_pair_of_one_site_for_a_while() -> None:
    key, other = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    keys = [key.public_key()]
    ticket = peer_tickets.PeerTicket("a", "b", "lab", 100.0)
    signed = peer_tickets.sign(ticket, key)
    assert peer_tickets.verify(signed, keys, "b", "lab", 99.0) == ticket
    users = sign_ticket(Ticket(KEY, "b", 1, "v1", 100.0), key)
    for wrong, node, site, now, reason in (
        (signed, "c", "lab", 99.0, Reason.TICKET_WRONG_NODE),
        (signed, "b", "elsewhere", 99.0, Reason.TICKET_WRONG_NODE),
        (signed, "b", "lab", 100.0, Reason.TICKET_EXPIRED),
        (peer_tickets.sign(ticket, other), "b", "lab", 99.0, Reason.TICKET_INVALID),
        (users, "b", "lab", 99.0, Reason.TICKET_INVALID),
        (b"", "b", "lab", 99.0, Reason.TICKET_INVALID),
        (b"\xff" * 9, "b", "lab", 99.0, Reason.TICKET_INVALID),
    ):
        with pytest.raises(RoostError) as caught:
            peer_tickets.verify(wrong, keys, node, site, now)
        assert caught.value.reason is reason
