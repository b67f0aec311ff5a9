"""A commit whose preparation a round of collecting overtakes: what is gone is put again."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import pytest

from edge_agent.commits import _PREPARED_ANEW, Commits
from edge_agent.state.blobs import MemoryBlobs
from edge_agent.state.bundles import BundleStore
from edge_agent.state.chunks import IN_USE, ChunkStore
from edge_agent.state.copies import CopyStore
from edge_agent.state.index import Index
from edge_agent.state.local_files import LocalFiles
from edge_agent.state.store import StateStore
from shared.content import Blob
from shared.errors import Reason, RoostError
from shared.identity import InstanceKey
from shared.manifest import StateManifest
from tests.support.fake_control import FakeControl, Owned

KEY = InstanceKey("default", "probe", "ana")
FILES = 2000


class Collecting(FakeControl):
    """Rounds go by while a commit is on its way, and take with them what it has just put."""

    rounds_left = 0
    blobs: MemoryBlobs

    async def commit(self, *args: object, **options: object) -> None:  # type: ignore[override]
        if self.rounds_left:
            self.rounds_left -= 1
            self.gc_round += 2
            self.blobs.kept.clear()
        await super().commit(*args, **options)  # type: ignore[arg-type]


async def publish(tmp_path: Path, rounds: int, along: bool = False) -> tuple[Collecting, MemoryBlobs, str]:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "file").write_bytes(b"content")
    blobs = MemoryBlobs()
    chunks = ChunkStore(tmp_path / "chunks")
    state = StateStore(chunks, blobs, BundleStore(tmp_path / "bundles", chunks, blobs))
    control = Collecting({KEY: Owned(epoch=1)}, takes_inline=along)
    control.rounds_left, control.blobs = rounds, blobs
    with LocalFiles(tmp_path / "state") as files:
        captured = await state.capture(files, None)
    manifest = StateManifest(str(KEY), 1, 1, captured.nodes).with_turn("t1", "done")
    root, _ = await Commits(state, control).publish(KEY, captured, manifest, "t1", lambda: False)
    assert await state.beside(control.inline.get(KEY, ())).load(KEY, 1, root) == manifest
    return control, blobs, root


@dataclass
class Many:
    """An instance with so many files that its manifest is cut up."""

    state: StateStore
    control: FakeControl
    files: LocalFiles
    blobs: MemoryBlobs
    chunks: ChunkStore
    base: StateManifest = field(default_factory=lambda: StateManifest(str(KEY), 0, 0))
    root: str = ""
    index: Index | None = None

    async def commit(self, said: StateManifest | None) -> set[str]:
        """One more version; the names of the blobs that it put. `said`: what it says to be made from."""
        self.blobs.kept.clear()
        captured = await self.state.capture(self.files, self.index)
        manifest = replace(
            self.base, epoch=1, version=self.base.version + 1, nodes=captured.nodes, parent=self.root
        ).with_turn(f"t{self.base.version + 1}", "done")
        self.root, self.index = await Commits(self.state, self.control).publish(
            KEY, captured, manifest, manifest.turns[-1].id, lambda: False, base=said
        )
        self.base = manifest
        assert await self.state.load(KEY, manifest.version, self.root) == manifest
        return set(self.blobs.kept)


@pytest.fixture
async def many(tmp_path: Path) -> AsyncIterator[Many]:
    (tmp_path / "state").mkdir()
    for i in range(FILES):
        (tmp_path / "state" / f"f{i:04}").write_bytes(f"file {i}".encode())
    blobs, chunks = MemoryBlobs(), ChunkStore(tmp_path / "chunks")
    state = StateStore(chunks, blobs, BundleStore(tmp_path / "bundles", chunks, blobs))
    control = FakeControl({KEY: Owned(epoch=1)}, takes_inline=False)
    with LocalFiles(tmp_path / "state") as files:
        yield Many(state, control, files, blobs, chunks)


async def test_of_a_manifest_in_parts_only_those_that_changed_are_put(many: Many, tmp_path: Path) -> None:
    whole = await many.commit(many.base)
    (tmp_path / "state" / "f0600").write_bytes(b"changed")
    some = await many.commit(many.base)
    assert 2 < len(some) < len(whole) - FILES, "a chunk, the root, and not all of the parts"


async def test_all_parts_are_put_if_it_is_not_known_what_the_version_before_has(
    many: Many, tmp_path: Path
) -> None:
    whole = await many.commit(many.base)
    (tmp_path / "state" / "f0600").write_bytes(b"changed")
    many.chunks._path(many.root).unlink()
    parts = len(whole) - FILES
    assert len(await many.commit(many.base)) == 1 + parts
    assert len(await many.commit(None)) == parts


async def test_what_a_round_took_is_put_again(tmp_path: Path) -> None:
    control, blobs, root = await publish(tmp_path, 2)
    assert control.owned[KEY] == Owned(1, 1, root)
    assert control.stale == [0, 2]
    assert len(blobs.kept) == 2, "the chunk, and the manifest"


async def test_what_goes_along_with_a_commit_goes_along_again(tmp_path: Path) -> None:
    control, blobs, root = await publish(tmp_path, 2, along=True)
    assert control.owned[KEY] == Owned(1, 1, root)
    assert control.stale == [0, 2]
    assert (len(control.inline[KEY]), blobs.kept) == (2, {})


async def test_one_that_rounds_always_overtake_is_not_committed(tmp_path: Path) -> None:
    with pytest.raises(RoostError) as caught:
        await publish(tmp_path, 1000)
    assert caught.value.reason is Reason.TURN_NOT_COMMITTED


def test_a_chunk_stays_here_for_longer_than_a_commit_may_take() -> None:
    seconds = {field.name: field.default for field in fields(Commits)}
    assert 2 * _PREPARED_ANEW * (seconds["upload_seconds"] + seconds["commit_seconds"]) < IN_USE


async def test_what_is_asked_for_is_put_from_copies_for_other_nodes_too(tmp_path: Path) -> None:
    own, others, nobodys = Blob.of(b"own"), Blob.of(b"another's"), Blob.of(b"nobody's")
    blobs, chunks, copies = MemoryBlobs(), ChunkStore(tmp_path / "a"), CopyStore(tmp_path / "b", 1 << 20)
    chunks.put(own)
    copies.put(others)
    state = StateStore(chunks, blobs, BundleStore(tmp_path / "bundles", chunks, blobs), copies)
    assert await state.salvage([own.hash, others.hash, nobodys.hash]) == 2
    assert blobs.kept.keys() == {own.hash, others.hash}
