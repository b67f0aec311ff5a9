"""An instance with a large state answers before all of it has come, and nobody ever sees what has not."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from roost.client import AsyncChat
from shared.content import chunks_of, hash_of
from shared.errors import Reason, RoostError
from tests.support.eventually import eventually
from tests.support.mesh import AGENTS, NORTH, SOUTH, Mesh, running_mesh

PROBE = AGENTS / "probe"
OSLO = (59.9, 10.7)
FILES, MIB = 8, 12  # and so many MiB each
SECONDS = 60.0


class Moved:
    """Ana's instance, whose files came to lie with another node, which has none of them."""

    def __init__(
        self, mesh: Mesh, ana: AsyncChat, digests: dict[str, str], chunks: dict[str, list[str]]
    ) -> None:
        self.mesh = mesh
        self.ana = ana
        self.digests = digests
        self.chunks = chunks

    def state(self) -> Path:
        (used,) = self.mesh.used_directories("edge-south")
        return self.mesh.data_dir("edge-south") / "jails" / used / "state"

    def unfilled(self) -> list[str]:
        """Those of the files that take less of the disk than they are long."""
        found = [(name, (self.state() / name).stat()) for name in self.digests]
        return [name for name, status in found if status.st_blocks * 512 < status.st_size]

    async def send(self, text: str) -> str:
        return (await self.ana.send(text, timeout=SECONDS)).text

    async def check(self) -> None:
        for name, digest in self.digests.items():
            assert await self.send(f"digest {name}") == digest


@asynccontextmanager
async def moved(tmp_path: Path) -> AsyncIterator[Moved]:
    async with running_mesh(tmp_path, [NORTH, SOUTH]) as mesh:
        await mesh.deploy(PROBE, turn_timeout='"50s"')
        async with mesh.client(OSLO) as client, client.attach("probe", "ana") as ana:
            for n in range(FILES):
                await ana.send(f"fill big-{n} {MIB}", timeout=SECONDS)
            await ana.send("append one")
            (used,) = mesh.used_directories("edge-north")
            digests, chunks = {}, {}
            for path in sorted((mesh.data_dir("edge-north") / "jails" / used / "state").glob("big-*")):
                digests[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
                with path.open("rb") as file:
                    chunks[path.name] = [hash_of(c) for c in chunks_of(file.fileno(), path.stat().st_size)]
            await mesh.take_away("probe", "ana")
            yield Moved(mesh, ana, digests, chunks)


async def test_the_first_reply_does_not_wait_for_large_files(tmp_path: Path) -> None:
    async with moved(tmp_path) as there:
        reply = await there.ana.send("append two", timeout=SECONDS)
        unfilled = there.unfilled()
        assert json.loads(reply.text) == ["one", "two"]
        assert (reply.receipt.node, reply.receipt.resumed_from) == ("edge-south", "blobs")
        assert unfilled, "the first turn was answered, and committed, before all was there"
        last = unfilled[-1]
        assert await there.send(f"digest {last}") == there.digests[last]
        await there.check()
        await eventually(lambda: not there.unfilled(), SECONDS)
        # What came later is as good as what came at once: nothing of it is read or sent again.
        again = await there.ana.send("append three", timeout=SECONDS)
        assert json.loads(again.text) == ["one", "two", "three"]
        await there.mesh.nodes["edge-south"].stop()
        await there.mesh.nodes["edge-south"].start()
        await there.check()


async def test_a_turn_ends_while_its_agent_waits_for_a_file(tmp_path: Path) -> None:
    async with moved(tmp_path) as there:
        await there.send("append two")
        last = there.unfilled()[-1]
        await there.send(f"peek {last}")
        await eventually(lambda: not there.unfilled(), SECONDS)
        assert json.loads(await there.send("peeked")) == [there.digests[last]]
        assert json.loads(await there.send("lines")) == ["one", "two"]


async def test_a_daemon_that_dies_while_files_are_coming(tmp_path: Path) -> None:
    async with moved(tmp_path) as there:
        await there.send("append two")
        assert there.unfilled()
        there.mesh.daemon("edge-south").kill()
        await there.check()
        assert json.loads(await there.send("lines")) == ["one", "two"]


async def test_a_node_that_dies_while_files_are_coming(tmp_path: Path) -> None:
    async with moved(tmp_path) as there:
        await there.send("append two")
        assert there.unfilled()
        await there.mesh.nodes["edge-south"].kill()
        await there.mesh.nodes["edge-south"].start()
        await there.check()
        assert json.loads(await there.send("lines")) == ["one", "two"]


async def test_a_file_that_is_cut_before_it_has_come(tmp_path: Path) -> None:
    async with moved(tmp_path) as there:
        name = f"big-{FILES - 1}"
        # By itself the client sends the turn again, and then all is there first.
        assert await there.send(f"cut {name} 100") == "ok"
        assert "was changed without being opened" in there.mesh.nodes["edge-south"].log()
        assert not there.unfilled()
        assert (there.state() / name).stat().st_size == 100
        del there.digests[name]
        await there.check()


async def test_a_chunk_that_is_lost_is_said_and_nothing_is_made_of_what_is_left(tmp_path: Path) -> None:
    async with moved(tmp_path) as there:
        name = f"big-{FILES - 1}"
        lost = there.chunks[name][-1]
        (blob,) = (there.mesh.directory / "blobs" / "chunks").glob(f"*/{lost}")
        kept = blob.with_name("kept")
        blob.rename(kept)
        with pytest.raises(RoostError) as caught:
            await there.send(f"digest {name}")
        assert caught.value.reason is Reason.RESTORE_INCOMPLETE
        os.rename(kept, blob)
        await there.check()
        assert json.loads(await there.send("lines")) == ["one"]
