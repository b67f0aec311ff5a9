"""A commit whose preparation a round of collecting overtakes: what is gone is put again."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from edge_agent.commits import _PREPARED_ANEW, Commits
from edge_agent.state.blobs import MemoryBlobs
from edge_agent.state.bundles import BundleStore
from edge_agent.state.chunks import IN_USE, ChunkStore
from edge_agent.state.copies import CopyStore
from edge_agent.state.local_files import LocalFiles
from edge_agent.state.store import StateStore
from shared.content import Blob
from shared.errors import Reason, RoostError
from shared.identity import InstanceKey
from shared.manifest import StateManifest
from tests.support.fake_control import FakeControl, Owned

KEY = InstanceKey("default", "probe", "ana")


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
