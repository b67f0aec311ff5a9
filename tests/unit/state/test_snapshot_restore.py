"""What was captured is what is restored: whatever the tree, whatever lies there, however often cut off."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_agent.state.blobs import MemoryBlobs
from edge_agent.state.chunks import ChunkStore
from edge_agent.state.files import MAX_STATE, Entry, Files
from edge_agent.state.index import Index
from edge_agent.state.local_files import LocalFiles
from edge_agent.state.restore import restore
from edge_agent.state.snapshot import Encoding, Snapshot, capture, upload
from edge_agent.state.source import Source
from shared.errors import Reason, RoostError
from shared.manifest import FileNode, StateManifest, decode, encode
from tests.support.eventually import eventually
from tests.unit.state.trees import TREES, Dir, put, seen

FEW = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def later() -> int:
    """A clock by which what was just written has settled."""
    return time.time_ns() + 1_000_000_000


class Interrupted(Exception):
    pass


class CutOff:
    """Files whose call number `after` is the last one to be carried out."""

    def __init__(self, files: Files, after: int) -> None:
        self._files = files
        self._left = after

    def _step(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise Interrupted

    async def scan(self) -> list[Entry]:
        return await self._files.scan()

    async def changed(self, since_ns: int) -> tuple[list[Entry], dict[str, int]]:
        return await self.scan(), {}

    async def open_read(self, path: str) -> int:
        return await self._files.open_read(path)

    async def open_write(self, path: str) -> int:
        self._step()
        return await self._files.open_write(path)

    async def commit_write(self, entry: Entry, more: bool = False) -> Entry:
        self._step()
        return await self._files.commit_write(entry, more)

    async def written(self, path: str, mtime_ns: int, more: bool) -> Entry:
        self._step()
        return await self._files.written(path, mtime_ns, more)

    async def make_dir(self, entry: Entry) -> None:
        self._step()
        await self._files.make_dir(entry)

    async def make_link(self, entry: Entry) -> None:
        self._step()
        await self._files.make_link(entry)

    async def remove(self, path: str) -> None:
        self._step()
        await self._files.remove(path)


@dataclass
class Node:
    """A machine with a chunk cache and some trees, and the mesh's blob store."""

    home: Path
    blobs: MemoryBlobs
    version: int = 0

    def __post_init__(self) -> None:
        self.chunks = ChunkStore(self.home / "chunks")

    def tree(self, name: str = "state") -> Path:
        path = self.home / name
        path.mkdir(exist_ok=True)
        return path

    async def commit(self, files: Files, previous: Index | None) -> tuple[str, Snapshot, Index]:
        snapshot = await capture(files, previous, self.chunks, later)
        self.version += 1
        encoded = Encoding.of(encode(StateManifest("t/a/u", 1, self.version, snapshot.nodes)))
        return encoded.root, snapshot, await upload(snapshot, encoded, self.chunks, self.blobs)

    async def load(self, root: str) -> StateManifest:
        async def fetch(hashes: Sequence[str]) -> dict[str, bytes]:
            return {hash: blob.plain for hash, blob in (await self.blobs.get(hashes)).items()}

        return await decode(root, fetch)

    async def restore(self, files: Files, root: str, index: Index | None = None) -> Index:
        return await restore(files, (await self.load(root)).nodes, index, Source(self.chunks, self.blobs))


@pytest.fixture
def blobs() -> MemoryBlobs:
    return MemoryBlobs()


@pytest.fixture
def node(tmp_path: Path, blobs: MemoryBlobs) -> Node:
    return Node(tmp_path / "one", blobs)


@pytest.fixture
def other(tmp_path: Path, blobs: MemoryBlobs) -> Node:
    return Node(tmp_path / "two", blobs)


@FEW
@given(first=TREES, second=TREES)
async def test_any_tree_comes_back_on_another_node_and_after_edits(first: Dir, second: Dir) -> None:
    with TemporaryDirectory() as home:
        blobs = MemoryBlobs()
        one, two = Node(Path(home, "one"), blobs), Node(Path(home, "two"), blobs)
        with LocalFiles(one.tree()) as here, LocalFiles(two.tree()) as there:
            put(first, one.tree())
            was_first = await seen(here)
            root_1, _, index_1 = await one.commit(here, None)
            put(second, one.tree())
            was_second = await seen(here)
            root_2, _, _ = await one.commit(here, index_1)

            restored = await two.restore(there, root_1)
            assert await seen(there) == was_first
            restored = await two.restore(there, root_2, restored)
            assert await seen(there) == was_second
            # Capturing what was restored gives the same tree again.
            again = await capture(there, restored, two.chunks, later)
            assert again.nodes == (await two.load(root_2)).nodes
            assert not again.new
            # A turn that failed is rolled back, by the index of before it.
            await one.restore(here, root_1, index_1)
            assert await seen(here) == was_first


@FEW
@given(first=TREES, second=TREES, cuts=st.lists(st.integers(0, 12), max_size=4))
async def test_a_restore_cut_off_anywhere_ends_right_when_run_again(
    first: Dir, second: Dir, cuts: list[int]
) -> None:
    with TemporaryDirectory() as home:
        node = Node(Path(home), MemoryBlobs())
        with LocalFiles(node.tree()) as files:
            put(second, node.tree())
            wanted = await seen(files)
            root, _, index = await node.commit(files, None)
            put(first, node.tree())
            for cut in cuts:
                try:
                    await node.restore(CutOff(files, cut), root, index)
                except Interrupted:
                    continue
            await node.restore(files, root, index)
            assert await seen(files) == wanted


async def test_only_what_changed_is_read_and_sent(node: Node) -> None:
    state = node.tree()
    (state / "big").write_bytes(os.urandom(1_000_000))
    (state / "small").write_bytes(b"1")
    with LocalFiles(state) as files:
        _, _, index = await node.commit(files, None)
        (state / "small").write_bytes(b"2")
        put_before = len(node.blobs.kept)
        (state / "big").chmod(0o600)  # new ctime: read again, but nothing new in it
        _, snapshot, index = await node.commit(files, index)
        assert len(snapshot.new) == 1
        assert len(node.blobs.kept) == put_before + 2, "one chunk and one manifest"

        unread = _Unreadable(files)
        assert (await capture(unread, index, node.chunks, later)).nodes == snapshot.nodes
        copy = Index.from_json(index.to_json())
        assert (await capture(unread, copy, node.chunks, later)).nodes == snapshot.nodes


class _Unreadable(CutOff):
    def __init__(self, files: Files) -> None:
        super().__init__(files, 0)

    async def open_read(self, path: str) -> int:
        raise AssertionError(f"{path} was read again")


async def test_an_upload_that_failed_is_made_up_for_by_the_next(node: Node, other: Node) -> None:
    with LocalFiles(node.tree()) as files, LocalFiles(other.tree()) as there:
        (node.tree() / "a").write_bytes(b"first")
        node.blobs.down = True
        first = await capture(files, None, node.chunks, later)
        manifest = Encoding.of(encode(StateManifest("t/a/u", 1, 1, first.nodes)))
        with pytest.raises(RoostError) as caught:
            await upload(first, manifest, node.chunks, node.blobs)
        assert caught.value.reason is Reason.BLOBS_UNAVAILABLE
        node.blobs.down = False
        root, _, _ = await node.commit(files, first.index)
        await other.restore(there, root)
        assert (other.tree() / "a").read_bytes() == b"first"


async def test_an_untouched_file_is_left_alone_and_a_touched_one_rolled_back(node: Node) -> None:
    state = node.tree()
    (state / "kept").write_bytes(b"kept")
    (state / "changed").write_bytes(b"before")
    with LocalFiles(state) as files:
        root, _, index = await node.commit(files, None)
        inode = (state / "kept").stat().st_ino
        (state / "changed").write_bytes(b"after!")
        (state / "extra").mkdir()
        (state / "extra" / "file").write_bytes(b"")
        await node.restore(files, root, index)
        assert (state / "kept").stat().st_ino == inode
        assert (state / "changed").read_bytes() == b"before"
        assert sorted(os.listdir(state)) == ["changed", "kept"]


async def test_sqlite_in_wal_mode_comes_back_as_it_was_at_the_snapshot(node: Node, other: Node) -> None:
    db = sqlite3.connect(node.tree() / "pantry.db", isolation_level=None)
    db.execute("pragma journal_mode = wal")
    db.execute("create table pantry (item text)")
    db.execute("insert into pantry values ('flour')")
    with LocalFiles(node.tree()) as files, LocalFiles(other.tree()) as there:
        root, _, index = await node.commit(files, None)
        db.execute("insert into pantry values ('salt')")
        root_2, _, _ = await node.commit(files, index)
        db.close()
        for at, wanted in ((root, [("flour",)]), (root_2, [("flour",), ("salt",)])):
            await other.restore(there, at)
            copy = sqlite3.connect(other.tree() / "pantry.db")
            assert copy.execute("select item from pantry").fetchall() == wanted
            assert copy.execute("pragma integrity_check").fetchall() == [("ok",)]
            copy.close()


async def test_a_chunk_damaged_on_the_nodes_disk_is_fetched_again(node: Node) -> None:
    with LocalFiles(node.tree()) as files, LocalFiles(node.tree("copy")) as copy:
        (node.tree() / "a").write_bytes(b"content")
        root, snapshot, _ = await node.commit(files, None)
        (hash,) = snapshot.new
        node.chunks.settle()
        path = node.home / "chunks" / hash[:2] / hash
        damaged = bytearray(path.read_bytes())
        damaged[-1] ^= 1
        path.write_bytes(damaged)
        await node.restore(copy, root)
        assert (node.tree("copy") / "a").read_bytes() == b"content"
        await eventually(lambda: node.chunks.get(hash) is not None, 5.0, "the good copy is kept")


@pytest.mark.parametrize("harm", ["lost", "flipped", "emptied"])
async def test_what_the_blob_store_lost_is_named_and_nothing_is_touched(
    node: Node, other: Node, harm: str
) -> None:
    with LocalFiles(node.tree()) as files, LocalFiles(other.tree()) as there:
        (node.tree() / "dir").mkdir()
        (node.tree() / "dir" / "pantry.db").write_bytes(b"content")
        root, snapshot, _ = await node.commit(files, None)
        (hash,) = snapshot.new
        match harm:
            case "lost":
                del node.blobs.kept[hash]
            case "flipped":
                node.blobs.kept[hash] = node.blobs.kept[hash][:-1] + b"?"
            case "emptied":
                node.blobs.kept[hash] = b""
        (other.tree() / "there").write_bytes(b"")
        with pytest.raises(RoostError) as caught:
            await other.restore(there, root)
        assert caught.value.reason is Reason.RESTORE_INCOMPLETE
        assert "dir/pantry.db" in caught.value.message
        assert os.listdir(other.tree()) == ["there"]


async def test_a_file_whose_chunks_are_not_its_size_is_refused(node: Node) -> None:
    with LocalFiles(node.tree()) as files:
        (node.tree() / "a").write_bytes(b"content")
        _, snapshot, _ = await node.commit(files, None)
        (chunk,) = snapshot.new
        forged = [FileNode("a", 0o600, 0, 8, (chunk,))]
        with pytest.raises(RoostError) as caught:
            await restore(files, forged, None, Source(node.chunks, node.blobs))
        assert caught.value.reason is Reason.RESTORE_INCOMPLETE


async def test_a_sparse_file_of_wild_size_is_refused_unread(node: Node) -> None:
    (node.tree() / "sparse").touch()
    os.truncate(node.tree() / "sparse", MAX_STATE + 1)
    with LocalFiles(node.tree()) as files:
        with pytest.raises(RoostError) as caught:
            await capture(_Unreadable(files), None, node.chunks)
    assert caught.value.reason is Reason.STATE_TOO_LARGE


async def test_a_chunk_that_is_gone_before_the_upload_is_an_error(node: Node) -> None:
    with LocalFiles(node.tree()) as files:
        (node.tree() / "a").write_bytes(os.urandom(1 << 20))  # too much to be kept in memory
        snapshot = await capture(files, None, node.chunks)
        with pytest.raises(RoostError) as caught:
            await upload(snapshot, Encoding("", ()), ChunkStore(node.home / "empty"), node.blobs)
        assert caught.value.reason is Reason.BLOB_MISSING


# --- trees that change while they are read ---------------------------------------------------


class _Meddler(CutOff):
    """Calls `meddle` between the scan and the first read."""

    def __init__(self, files: Files, meddle: object) -> None:
        super().__init__(files, 0)
        self._meddle = meddle

    async def open_read(self, path: str) -> int:
        self._meddle()  # type: ignore[operator]
        return await super().open_read(path)


async def test_a_directory_swapped_for_a_link_is_not_followed(node: Node, tmp_path: Path) -> None:
    secret = b"another user's secret"
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_bytes(secret)
    state = node.tree()
    (state / "dir").mkdir()
    (state / "dir" / "file").write_bytes(b"x" * len(secret))

    def swap() -> None:
        (state / "dir").rename(state / "was")
        (state / "dir").symlink_to(tmp_path / "outside")

    with LocalFiles(state) as files:
        with pytest.raises(RoostError) as caught:
            await capture(_Meddler(files, swap), None, node.chunks)
    assert caught.value.reason is Reason.JAIL_FAILED
    assert not [p for p in (node.home / "chunks").rglob("*") if p.is_file()]


async def test_a_file_swapped_for_a_fifo_does_not_block(node: Node) -> None:
    state = node.tree()
    (state / "file").write_bytes(b"x")

    def swap() -> None:
        (state / "file").unlink()
        os.mkfifo(state / "file")

    with LocalFiles(state) as files:
        with pytest.raises(RoostError) as caught:
            await capture(_Meddler(files, swap), None, node.chunks)
    assert caught.value.reason is Reason.JAIL_FAILED


@pytest.mark.parametrize("to", [b"", b"shrunk", b"y" * 100, b"z" * 5000])
async def test_a_file_that_is_written_while_it_is_read_is_no_snapshot(node: Node, to: bytes) -> None:
    (node.tree() / "log").write_bytes(b"x" * 100)
    os.utime(node.tree() / "log", (1, 1))
    with LocalFiles(node.tree()) as files:
        meddler = _Meddler(files, lambda: (node.tree() / "log").write_bytes(to))
        with pytest.raises(RoostError) as caught:
            await capture(meddler, None, node.chunks)
    assert caught.value.reason is Reason.JAIL_FAILED
    assert "log" in caught.value.message
