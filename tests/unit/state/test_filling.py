"""Files that come after the first turn: nobody sees them unfilled, whatever is done to them meanwhile."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from edge_agent.state.blobs import MemoryBlobs
from edge_agent.state.bundles import BundleStore
from edge_agent.state.chunks import ChunkStore
from edge_agent.state.files import Entry
from edge_agent.state.filling import FROM_BYTES, LARGE, Filling, Lanes, choose
from edge_agent.state.index import Index
from edge_agent.state.local_files import LocalFiles
from edge_agent.state.restore import restore
from edge_agent.state.snapshot import Encoding, Snapshot, capture, upload
from edge_agent.state.source import Source
from edge_agent.state.store import StateStore
from shared.errors import Reason, RoostError
from shared.manifest import FileNode, Node, StateManifest, encode
from tests.support.eventually import eventually

MIB = 1 << 20
LARGE_FILES = {"one": 8 * MIB, "two": 3 * MIB + 1, "three": 2 * MIB}


@dataclass
class FakeGuard:
    """Every file that is guarded, by inode, with who is to be told."""

    guarded: dict[int, Callable[[], None]] = field(default_factory=dict)
    most: int = 1000

    async def guard(self, fd: int, opening: Callable[[], None]) -> None:
        if len(self.guarded) >= self.most:
            raise RoostError(Reason.JAIL_FAILED, "the kernel can't")
        self.guarded[os.fstat(fd).st_ino] = opening
        for _ in range(5):  # until the answer is here
            await asyncio.sleep(0)

    async def release(self, fd: int) -> None:
        del self.guarded[os.fstat(fd).st_ino]


class GatedBlobs(MemoryBlobs):
    """Gives out as many answers as there were `let` through."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Semaphore(0)
        self.open = False
        self.unlinked = 0  # answers that there is no coordinator

    async def get(self, hashes):  # type: ignore[no-untyped-def]
        if not self.open:
            await self.gate.acquire()
        if self.unlinked:
            self.unlinked -= 1
            raise RoostError(Reason.COORDINATOR_UNREACHABLE, "no link")
        return await super().get(hashes)


class WatchedFiles(LocalFiles):
    """`interfere` does something just after a slice of a file was written."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.interfere: Callable[[], None] = lambda: None

    async def written(self, path: str, mtime_ns: int, more: bool) -> Entry:
        self.interfere()
        return await super().written(path, mtime_ns, more)


@dataclass
class Woken:
    """A tree that was restored with placeholders on a node that has none of its chunks."""

    root: Path
    files: WatchedFiles
    target: tuple[Node, ...]
    index: Index
    filling: Filling
    guard: FakeGuard
    blobs: GatedBlobs
    chunks: ChunkStore
    lanes: Lanes

    async def capture(self) -> Snapshot:
        async with self.filling.quiet:
            return await capture(self.files, self.index, self.chunks, filling=self.filling)

    def content(self, name: str) -> tuple[str, ...]:
        return next(n.chunks for n in self.target if isinstance(n, FileNode) and n.path == name)


@pytest.fixture(scope="module")
def contents() -> dict[str, bytes]:
    rng = random.Random(7)
    return {name: rng.randbytes(size) for name, size in {**LARGE_FILES, "small": 1000}.items()}


@dataclass
class Committed:
    nodes: tuple[Node, ...]
    blobs: dict[str, bytes]


@pytest.fixture(scope="module")
def committed(tmp_path_factory: pytest.TempPathFactory, contents: dict[str, bytes]) -> Committed:
    home = tmp_path_factory.mktemp("committed")
    for name, content in contents.items():
        (home / name).write_bytes(content)
        os.utime(home / name, (1_600_000_000, 1_600_000_000))

    async def commit() -> Committed:
        blobs, chunks = MemoryBlobs(), ChunkStore(tmp_path_factory.mktemp("chunks"))
        with LocalFiles(home) as files:
            snapshot = await capture(files, None, chunks)
            manifest = encode(StateManifest("t/a/u", 1, 1, snapshot.nodes))
            await upload(snapshot, Encoding.of(manifest), chunks, blobs)
        return Committed(snapshot.nodes, blobs.kept)

    return asyncio.run(commit())


@pytest.fixture
async def woken(tmp_path: Path, committed: Committed) -> AsyncIterator[Woken]:
    root = tmp_path / "state"
    root.mkdir()
    blobs, guard = GatedBlobs(), FakeGuard()
    blobs.kept = dict(committed.blobs)
    lanes = Lanes(from_bytes=sum(LARGE_FILES.values()), pause=0.001)
    with WatchedFiles(root) as files:
        chunks = ChunkStore(tmp_path / "chunks")
        source = Source(chunks, blobs)
        filling = Filling(files, guard, source, lanes)
        blobs.gate.release()  # what is small comes at once
        index = await restore(files, committed.nodes, None, source, filling)
        yield Woken(root, files, committed.nodes, index, filling, guard, blobs, chunks, lanes)
        filling.close()


def nodes(*sizes: int) -> list[FileNode]:
    return [FileNode(str(n), 0o600, 0, size, ()) for n, size in enumerate(sizes)]


def test_only_large_files_of_a_large_state_come_later() -> None:
    assert choose(nodes(FROM_BYTES - 1)) == []
    some = nodes(LARGE - 1, FROM_BYTES, LARGE)
    assert choose(some) == [some[1], some[2]]
    assert len(choose(nodes(*[LARGE] * 2000))) == 1024
    assert choose(some, most=1) == [some[1]]
    assert choose([replace(some[1], mode=0o700), some[2]]) == [some[2]]


async def test_what_is_small_is_there_and_what_is_large_looks_so(
    woken: Woken, contents: dict[str, bytes]
) -> None:
    assert (woken.root / "small").read_bytes() == contents["small"]
    for name, size in LARGE_FILES.items():
        status = (woken.root / name).stat()
        assert (status.st_size, status.st_mtime) == (size, 1_600_000_000)
        assert status.st_ino in woken.guard.guarded
        assert status.st_blocks == 0


async def test_what_a_node_has_no_room_for_is_there_before_the_first_turn(
    tmp_path: Path, committed: Committed, contents: dict[str, bytes]
) -> None:
    blobs, lanes = MemoryBlobs(), Lanes(room=3, from_bytes=1)
    blobs.kept = committed.blobs
    chunks = ChunkStore(tmp_path / "chunks")
    state = StateStore(chunks, blobs, BundleStore(tmp_path / "bundles", chunks, blobs), lanes=lanes)
    manifest = StateManifest("t/a/u", 1, 1, committed.nodes)
    fillings: list[Filling] = []
    with ExitStack() as stack:
        for name, later in (("first", 3), ("second", 0), ("third", 3)):
            root = tmp_path / name
            root.mkdir()
            files, guard = stack.enter_context(LocalFiles(root)), FakeGuard()
            _, filling = await state.restore(files, manifest, None, guard)
            assert len(guard.guarded) == later
            if filling is None:
                assert {path.name: path.read_bytes() for path in root.iterdir()} == contents
                fillings.pop().close()  # the first one's jail ends
            else:
                fillings.append(filling)
        await fillings[0].run()
        assert lanes.room == 3
        fillings[0].close()
        assert lanes.room == 3, "once"


async def test_all_is_filled_and_then_known(woken: Woken, contents: dict[str, bytes]) -> None:
    woken.blobs.open = True
    await woken.filling.run()
    assert not woken.filling.unfinished
    assert woken.guard.guarded == {}
    assert {path.name: path.read_bytes() for path in woken.root.iterdir()} == contents
    snapshot = await woken.capture()
    assert snapshot.nodes == woken.target
    assert not snapshot.new
    # What was filled is not read again, then or later.
    assert all(not known.racy for known in snapshot.index.files.values())
    (woken.root / "three").write_bytes(b"x" * LARGE_FILES["three"])
    os.utime(woken.root / "three", (1_600_000_000, 1_600_000_000))
    again = await capture(woken.files, snapshot.committed, woken.chunks)
    assert again.nodes != woken.target


@pytest.mark.parametrize("answers", [0, 1, 3, 5])
async def test_a_snapshot_in_the_middle_is_what_was_committed(woken: Woken, answers: int) -> None:
    filler = asyncio.create_task(woken.filling.run())
    for _ in range(answers):
        woken.blobs.gate.release()
    await eventually(woken.blobs.gate.locked, 5)
    for _ in range(3):
        snapshot = await woken.capture()
        assert (snapshot.nodes, snapshot.new) == (woken.target, frozenset())
    # Nothing that lies there is ever taken for content by an index.
    async with woken.filling.quiet:
        again = await capture(woken.files, snapshot.index, woken.chunks)
    unfilled = [name for name in LARGE_FILES if (woken.root / name).stat().st_ino in woken.guard.guarded]
    assert unfilled
    assert all(snapshot.index.files[name].racy for name in unfilled)
    assert again.nodes != woken.target
    filler.cancel()
    await asyncio.wait([filler])


async def test_what_somebody_opens_comes_first(woken: Woken) -> None:
    smallest = (woken.root / "three").stat().st_ino
    woken.guard.guarded[smallest]()
    filler = asyncio.create_task(woken.filling.run())
    while smallest in woken.guard.guarded:
        woken.blobs.gate.release()
        await asyncio.sleep(0.01)
    assert len(woken.guard.guarded) == 2
    filler.cancel()
    await asyncio.wait([filler])


async def test_placeholders_may_be_moved_linked_and_removed(woken: Woken, contents: dict[str, bytes]) -> None:
    (woken.root / "one").rename(woken.root / "moved")
    os.link(woken.root / "two", woken.root / "linked")
    (woken.root / "three").unlink()
    snapshot = await woken.capture()
    found = {node.path: node.chunks for node in snapshot.nodes if isinstance(node, FileNode)}
    assert found["moved"] == woken.content("one")
    assert found["two"] == found["linked"] == woken.content("two")
    assert set(found) == {"moved", "two", "linked", "small"}
    assert not snapshot.new
    woken.blobs.open = True
    await woken.filling.run()
    assert (woken.root / "moved").read_bytes() == contents["one"]
    assert (woken.root / "linked").read_bytes() == contents["two"]
    woken.index = snapshot.committed
    later = await woken.capture()
    assert (later.nodes, later.new) == (snapshot.nodes, frozenset())


@pytest.mark.parametrize("size", [0, 4000, LARGE_FILES["one"], LARGE_FILES["one"] + 1])
async def test_a_placeholder_that_is_cut_is_noticed_by_all(woken: Woken, size: int) -> None:
    os.truncate(woken.root / "one", size)
    for notices in (woken.capture, woken.filling.run):
        woken.blobs.open = True
        with pytest.raises(RoostError, match="'one' in /state was changed") as caught:
            await notices()
        assert caught.value.reason is Reason.STATE_CHANGED


async def test_a_cut_that_a_write_hides_is_noticed_in_the_end(woken: Woken) -> None:
    cut = []

    def cut_once() -> None:
        if not cut:
            cut.append(os.truncate(woken.root / "one", 4000))
            os.truncate(woken.root / "one", LARGE_FILES["one"])

    woken.files.interfere = cut_once
    woken.blobs.open = True
    with pytest.raises(RoostError, match="'one' in /state was changed"):
        await woken.filling.run()


async def test_a_lost_chunk_says_which_file_can_not_be_had(woken: Woken) -> None:
    woken.blobs.open = True
    woken.blobs.kept.pop(woken.content("two")[-1])
    with pytest.raises(RoostError, match="'two' can't be restored") as caught:
        await woken.filling.run()
    assert caught.value.reason is Reason.RESTORE_INCOMPLETE
    assert (woken.root / "two").stat().st_ino in woken.guard.guarded


async def test_what_has_lost_its_last_name_is_not_fetched(woken: Woken) -> None:
    for name in LARGE_FILES:
        (woken.root / name).unlink()
    await woken.filling.run()  # while the store answers nothing
    assert woken.guard.guarded == {}
    assert not woken.filling.unfinished


async def test_who_still_waits_for_a_file_without_a_name_is_served(woken: Woken) -> None:
    inode = (woken.root / "three").stat().st_ino
    woken.guard.guarded[inode]()
    (woken.root / "three").unlink()
    assert woken.filling.waited_for == "three"
    served = asyncio.create_task(woken.filling.served())
    woken.blobs.open = True
    await woken.filling.run()
    await asyncio.wait_for(served, 5)
    assert (woken.filling.waited_for, woken.guard.guarded) == ("", {})


async def test_what_waits_for_who_waits_hears_when_nothing_will_be_filled(woken: Woken) -> None:
    woken.guard.guarded[(woken.root / "three").stat().st_ino]()
    served = asyncio.create_task(woken.filling.served())
    woken.blobs.kept.clear()
    woken.blobs.open = True
    with pytest.raises(RoostError):
        await woken.filling.run()
    await asyncio.wait_for(served, 5)


@pytest.mark.parametrize("most", [0, 1])
async def test_where_the_kernel_can_not_all_comes_at_once(
    tmp_path: Path, committed: Committed, contents: dict[str, bytes], most: int
) -> None:
    guard, blobs = FakeGuard(most=most), MemoryBlobs()
    blobs.kept = committed.blobs
    root = tmp_path / "state"
    root.mkdir()
    chunks = ChunkStore(tmp_path / "chunks")
    lanes = Lanes(room=100, from_bytes=1)
    state = StateStore(chunks, blobs, BundleStore(tmp_path / "bundles", chunks, blobs), lanes=lanes)
    manifest = StateManifest("t/a/u", 1, 1, committed.nodes)
    with LocalFiles(root) as files:
        index, filling = await state.restore(files, manifest, None, guard)
        assert filling is None
        assert guard.guarded == {}
        assert lanes.room == 100
        assert {path.name: path.read_bytes() for path in root.iterdir()} == contents
        assert not any(known.racy for known in index.files.values())


async def test_a_store_that_is_away_is_asked_again(woken: Woken) -> None:
    woken.blobs.open = woken.blobs.down = True
    woken.blobs.unlinked = 3  # nor is there a link to a coordinator
    asyncio.get_running_loop().call_later(0.05, lambda: setattr(woken.blobs, "down", False))
    await woken.filling.run()
    assert not woken.filling.unfinished


async def test_a_store_that_stays_away_ends_it(woken: Woken) -> None:
    woken.lanes.patience = 0.05
    woken.blobs.open = woken.blobs.down = True
    with pytest.raises(RoostError) as caught:
        await woken.filling.run()
    assert caught.value.reason is Reason.BLOBS_UNAVAILABLE


async def test_a_restore_after_one_that_was_not_filled_takes_nothing_for_content(
    woken: Woken, contents: dict[str, bytes]
) -> None:
    woken.filling.close()
    woken.blobs.open = True
    await restore(woken.files, woken.target, woken.index, Source(woken.chunks, woken.blobs))
    assert {path.name: path.read_bytes() for path in woken.root.iterdir()} == contents
