"""A small world in which is collected: uploads, commits, and collectors that run step by step."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from coordinator.collecting.collector import Clock, Collector, Settings
from coordinator.collecting.marking import Marker
from coordinator.collecting.report import Report
from coordinator.collecting.rounds import Fence, NoFence, Round, Rounds
from coordinator.inline import InlineCommits
from coordinator.manifests import Manifests
from coordinator.ownership import Ownership, Placed, Uploaded, along_with
from coordinator.records import AgentRecord, Stored, agent_key
from coordinator.store.base import Put, Store
from coordinator.store.memory import MemoryStore
from shared.content import Blob
from shared.identity import InstanceKey
from shared.manifest import FileNode, StateManifest, blobs_of, decode, encode, encode_tree
from tests.support.fake_heap import Gate, GatedHeap, GatedStore, MemoryHeap
from tests.unit.coordinator.support import NoCache

KEYS = [InstanceKey("acme", "chef", user) for user in ("ana", "ben")]
CHUNKS = [Blob.of(f"chunk {i}".encode()) for i in range(3)]
HISTORY = 2
POLICY = f'[agent]\nname = "chef"\n[run]\nentry = "chef:agent"\n[state]\nhistory = {HISTORY}\n'
BUNDLE = encode_tree([FileNode("chef.py", 0o644, 0, 5, (Blob.of(b"agent").hash,))])
AT_ONCE = Settings(grace=0.0, rate=1e9)


class Behind:
    """What a coordinator has seen of the round: whatever it was last told."""

    def __init__(self) -> None:
        self.seen: Stored[Round] | None = None

    def round(self) -> Stored[Round] | None:
        return self.seen

    def learn_round(self, stored: Stored[Round]) -> None:
        if self.seen is None or stored.revision > self.seen.revision:
            self.seen = stored


@dataclass
class Upload:
    """A turn on its way: what is still to be asked for or put, then the commit, which brings `along` what is
    little."""

    key: InstanceKey
    gc_round: int
    manifest: StateManifest
    wanted: list[Blob]
    put: list[Blob] = field(default_factory=list)
    along: tuple[Blob, ...] = ()


@dataclass
class Run:
    """A collector at work."""

    gate: Gate
    task: asyncio.Task[Report]
    abandoned: bool = False  # it stands still: its lease is gone, and it does not know


class World:
    def __init__(self, fenced: bool, rules: Settings) -> None:
        self.store = MemoryStore()
        self.heap = MemoryHeap()
        self.manifests = Manifests(self.heap)  # type: ignore[arg-type]
        self.seen = Behind()
        self.rounds = Rounds(self.store, self.seen, 1.0)
        fence: Fence = self.rounds if fenced else NoFence()
        self.ownership = Ownership(self.store, NoCache(), lambda: 1e9, 1.0, fence)
        self.rules = rules
        self.time = 0.0
        self.inline = InlineCommits(self.store, self.heap, lambda: self.time, 1.0)

    async def begin(self) -> None:
        for hash, plain in (*BUNDLE.blobs.items(), (Blob.of(b"agent").hash, b"agent")):
            assert Blob.of(plain).hash == hash
            await self.heap.put_all([Blob.of(plain)])
        agent = AgentRecord("acme", "chef", "v1", POLICY, BUNDLE.root)
        await self.store.txn([], [Put(agent_key("acme", "chef"), agent.encode())])
        for key in KEYS:
            assert isinstance(await self.ownership.place(key, None, "a", "nearest", "v1"), Placed)

    def collector(self, gate: Gate) -> Collector:
        store = GatedStore(self.store, gate)
        return Collector(
            "me",
            store,
            GatedHeap(self.heap, gate),
            self.marker(store),
            Rounds(store, Behind(), 1.0),
            self.rules,
            Clock(steady=lambda: 0.0, unix=lambda: 1e9),  # it never learns that time has passed
        )

    def marker(self, store: Store) -> Marker:
        return Marker(store, self.manifests, InlineCommits(store, self.heap, lambda: self.time, 1.0))

    async def bring_on(self) -> None:
        """All that commits brought along, to the blob store."""
        self.time += 60.0
        await self.inline.reconcile()

    async def manifest(self, key: InstanceKey, root: str) -> StateManifest:
        at_hand = {blob.hash: blob.zstd for blob in await self.inline.of(key)}
        return await decode(root, lambda hashes: self.manifests.fetch(hashes, at_hand))

    async def collect(self) -> Report:
        """A whole round, with nothing between its steps."""
        gate = Gate()
        task = asyncio.create_task(self.collector(gate).collect())
        while not task.done():
            gate.let_one_pass()
            await asyncio.sleep(0)
        return task.result()

    async def upload(
        self, key: InstanceKey, chunks: Sequence[Blob], gc_round: int, little: bool = False
    ) -> Upload:
        stored = await self.ownership.read(key)
        assert stored is not None
        record = stored.value
        nodes = tuple(
            FileNode(f"f{i}", 0o600, 0, len(chunk.plain), (chunk.hash,)) for i, chunk in enumerate(chunks)
        )
        manifest = StateManifest(str(key), record.epoch, record.version + 1, nodes, parent=record.root)
        present = await self.manifest(key, record.root) if record.root else None
        durable = blobs_of(present.nodes) if present else set()
        new = [chunk for chunk in chunks if chunk.hash not in durable]
        own = [Blob.of(plain) for plain in encode(manifest).blobs.values()]
        if little:
            return Upload(key, gc_round, manifest, [], along=(*new, *own))
        return Upload(key, gc_round, manifest, new, own)

    async def commit(self, upload: Upload) -> None:
        manifest = upload.manifest
        root = encode(manifest).root
        turn = f"t{manifest.version}"
        beside = along_with(self.inline.writes(upload.key, manifest.version, upload.along))
        stored = await self.ownership.commit(
            "a",
            upload.key,
            manifest.epoch,
            manifest.version,
            root,
            turn,
            beside,
            Uploaded(0, upload.gc_round),
        )
        self.inline.committed(upload.key, manifest.version, upload.along, stored.revision)

    async def lost(self) -> list[str]:
        """What a version that is kept needs, and is nowhere."""
        found = [hash for hash in BUNDLE.blobs if not self.heap.where(hash)]
        for key in KEYS:
            stored = await self.ownership.read(key)
            assert stored is not None
            along = {blob.hash for blob in await self.inline.of(key)}
            root, kept = stored.value.root, 0
            while root and kept < HISTORY:
                if not self.heap.where(root) and root not in along:
                    found.append(f"the manifest of {key}, {kept} back")
                    break
                manifest = await self.manifest(key, root)
                needed = blobs_of(manifest.nodes) - along
                found += [f"{key}: {hash}" for hash in needed if not self.heap.where(hash)]
                root, kept = manifest.parent, kept + 1
        return found
