"""An agent's directory, packed by the developer and brought to a node."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from edge_agent.state.blobs import MemoryBlobs
from edge_agent.state.bundles import BundleStore
from edge_agent.state.chunks import ChunkStore
from shared.bundle import MAX_FILES, pack
from shared.content import Blob
from shared.errors import Reason, RoostError
from shared.manifest import DirNode, FileNode, LinkNode, encode_tree


@pytest.fixture
def agent(tmp_path: Path) -> Path:
    root = tmp_path / "agent"
    (root / "lib" / "empty").mkdir(parents=True)
    (root / "agent.toml").write_text("[agent]\n")
    (root / "lib" / "run.sh").write_text("#!/bin/sh\n")
    (root / "lib" / "run.sh").chmod(0o700)
    (root / "lib" / "back").symlink_to("../agent.toml")
    return root


class SlowBlobs(MemoryBlobs):
    """Counts what is asked of it, and holds answers back until `go`."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0
        self.go = asyncio.Event()
        self.go.set()

    async def get(self, hashes: Sequence[str]) -> dict[str, Blob]:
        self.asked += 1
        await self.go.wait()
        return await super().get(hashes)


async def packed_into(blobs: MemoryBlobs, agent: Path) -> str:
    packed = pack(agent)
    await blobs.put(map(Blob.of, packed.blobs.values()))
    return packed.root


@pytest.fixture
def blobs() -> SlowBlobs:
    return SlowBlobs()


@pytest.fixture
def store(tmp_path: Path, blobs: SlowBlobs) -> BundleStore:
    return BundleStore(tmp_path / "bundles", ChunkStore(tmp_path / "chunks"), blobs, timeout=20)


# --- packing ---------------------------------------------------------------------------------


def test_the_same_files_give_the_same_root_wherever_and_whenever(agent: Path, tmp_path: Path) -> None:
    first = pack(agent)
    other = agent.rename(tmp_path / "elsewhere")
    os.utime(other / "agent.toml", (1, 1))
    (other / "agent.toml").chmod(0o600)
    (other / "__pycache__").mkdir()
    (other / "__pycache__" / "x.pyc").write_bytes(b"")
    (other / "lib" / "y.pyc").write_bytes(b"")
    (other / ".git").mkdir()
    (other / ".venv").mkdir()
    assert pack(other).root == first.root
    (other / "agent.toml").write_text("[agent]\n# changed\n")
    assert pack(other).root != first.root


@pytest.mark.parametrize("target", ["/etc/passwd", "../../outside", "lib/../../outside", "out/further"])
def test_a_link_out_of_the_directory_is_refused(agent: Path, target: str) -> None:
    (agent.parent / "outside").mkdir()
    (agent / "link").symlink_to(target)
    if target == "out/further":  # a link through a link
        (agent / "link").unlink()
        (agent / "sub").mkdir()
        (agent / "sub" / "up").symlink_to("../..")
    with pytest.raises(RoostError) as caught:
        pack(agent)
    assert caught.value.reason is Reason.AGENT_INVALID
    assert caught.value.hint


def test_a_link_in_a_circle_is_harmless(agent: Path) -> None:
    (agent / "loop").symlink_to("loop")
    pack(agent)


def test_too_many_files_are_refused(agent: Path) -> None:
    for i in range(MAX_FILES):
        (agent / str(i)).touch()
    with pytest.raises(RoostError, match="more than 30,000 files") as caught:
        pack(agent)
    assert caught.value.reason is Reason.AGENT_INVALID


def test_too_large_a_directory_is_refused_without_being_read_whole(agent: Path) -> None:
    (agent / "model.bin").touch()
    os.truncate(agent / "model.bin", 1 << 40)
    with pytest.raises(RoostError, match=r"larger than 512M; model\.bin") as caught:
        pack(agent)
    assert caught.value.reason is Reason.AGENT_INVALID


@pytest.mark.parametrize("odd", ["fifo", "reserved name", "missing"])
def test_what_can_not_be_packed_is_named(agent: Path, odd: str) -> None:
    match odd:
        case "fifo":
            os.mkfifo(agent / "odd")
        case "reserved name":
            (agent / ".roost-tmp-odd").write_bytes(b"")
        case "missing":
            agent = agent / "odd"
    with pytest.raises(RoostError, match="odd") as caught:
        pack(agent)
    assert caught.value.reason is Reason.AGENT_INVALID


# --- on a node -------------------------------------------------------------------------------


async def test_a_bundle_is_brought_once_and_can_be_read_by_every_jail(
    store: BundleStore, blobs: SlowBlobs, agent: Path
) -> None:
    root = await packed_into(blobs, agent)
    old = os.umask(0o077)
    try:
        await asyncio.gather(*(store.ensure("v1", root) for _ in range(5)))
    finally:
        os.umask(old)
    made = store.path("v1")
    modes = {str(p.relative_to(made)): p.lstat().st_mode & 0o777 for p in [made, *made.rglob("*")]}
    assert modes == {
        ".": 0o755,
        "agent.toml": 0o644,
        "lib": 0o755,
        "lib/back": 0o777,
        "lib/empty": 0o755,
        "lib/run.sh": 0o755,
    }
    assert (made / "lib" / "back").read_text() == "[agent]\n"
    asked = blobs.asked
    await store.ensure("v1", root)
    assert blobs.asked == asked
    assert os.listdir(made.parent) == ["v1"]


async def test_modes_that_a_manifest_makes_up_do_not_count(store: BundleStore, blobs: SlowBlobs) -> None:
    forged = encode_tree([DirNode("d", 0), FileNode("d/f", 0o222, 0, 0, ()), LinkNode("l", "/etc/passwd")])
    await blobs.put(map(Blob.of, forged.blobs.values()))
    await store.ensure("v1", forged.root)
    assert (store.path("v1") / "d" / "f").stat().st_mode & 0o777 == 0o644
    assert (store.path("v1") / "d").stat().st_mode & 0o777 == 0o755


async def test_a_caller_that_gives_up_does_not_spoil_it_for_others(
    store: BundleStore, blobs: SlowBlobs, agent: Path
) -> None:
    root = await packed_into(blobs, agent)
    blobs.go.clear()
    impatient = asyncio.create_task(store.ensure("v1", root))
    patient = asyncio.create_task(store.ensure("v1", root))
    await asyncio.sleep(0)
    impatient.cancel()
    blobs.go.set()
    await patient
    assert impatient.cancelled()
    assert store.path("v1").is_dir()


async def test_what_fails_leaves_nothing_and_can_be_tried_again(
    store: BundleStore, blobs: SlowBlobs, agent: Path
) -> None:
    root = await packed_into(blobs, agent)
    blobs.down = True
    with pytest.raises(RoostError) as caught:
        await store.ensure("v1", root)
    assert caught.value.reason is Reason.BLOBS_UNAVAILABLE
    assert os.listdir(store.path("v1").parent) == []
    blobs.down = False
    await store.ensure("v1", root)
    assert store.path("v1").is_dir()


async def test_it_does_not_wait_for_ever(tmp_path: Path, agent: Path) -> None:
    blobs = SlowBlobs()
    store = BundleStore(tmp_path / "bundles", ChunkStore(tmp_path / "chunks"), blobs, timeout=0.001)
    root = await packed_into(blobs, agent)
    blobs.go.clear()
    with pytest.raises(RoostError) as caught:
        await store.ensure("v1", root)
    assert caught.value.reason is Reason.DEADLINE


async def test_closing_ends_what_is_being_made(store: BundleStore, blobs: SlowBlobs, agent: Path) -> None:
    root = await packed_into(blobs, agent)
    blobs.go.clear()
    waiting = asyncio.create_task(store.ensure("v1", root))
    await asyncio.sleep(0)
    await store.close()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert os.listdir(store.path("v1").parent) == []


async def test_what_a_crash_left_half_made_is_swept(tmp_path: Path) -> None:
    half = tmp_path / "bundles" / ".half-made-0123"
    half.mkdir(parents=True)
    (half / "file").write_bytes(b"")
    BundleStore(tmp_path / "bundles", ChunkStore(tmp_path / "chunks"), MemoryBlobs())
    assert not half.exists()


@pytest.mark.parametrize("version", ["", ".", "..", "a/b", ".half-made-x", "v\n", "x" * 200])
async def test_a_version_that_is_no_name_is_refused(store: BundleStore, version: str) -> None:
    with pytest.raises(RoostError) as caught:
        await store.ensure(version, "0" * 64)
    assert caught.value.reason is Reason.BAD_REQUEST
