"""The versions of an instance's state, by the commands that people type, in a real mesh."""

from __future__ import annotations

import asyncio
import io
import json
import os
import shutil
import sys
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from shared.errors import Reason, RoostError
from tests.support.mesh import AGENTS, NORTH, SOUTH, Mesh, running_mesh

OSLO = (59.9, 10.7)
PROBE = AGENTS / "probe"
TURNS = 60  # which take longer than some rounds of collecting


async def roost(mesh: Mesh, *args: str, code: int = 0) -> str:
    command = [sys.executable, "-m", "roost.cli.main", "--coordinator", mesh.addresses[0], *args]
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(60):
        out, err = await process.communicate()
    assert process.returncode == code, f"{out.decode()}\n{err.decode()}"
    return out.decode() + err.decode()


async def state(mesh: Mesh, verb: str, *args: str, user: str = "ana") -> Any:
    return json.loads(await roost(mesh, "state", verb, "probe", "--user", user, "--json", *args))


@pytest.fixture
async def mesh(tmp_path: Path) -> AsyncIterator[Mesh]:
    async with running_mesh(tmp_path, [NORTH, SOUTH]) as mesh:
        await mesh.deploy(PROBE)
        yield mesh


async def test_log_restore_export_and_import(mesh: Mesh, tmp_path: Path) -> None:
    async with mesh.client(OSLO) as client, client.attach("probe", "ana") as ana:
        for word in ("one", "two", "three"):
            await ana.send(f"append {word}", turn_id=word)
        kept = (await state(mesh, "log"))["versions"]
        assert [(v["version"], v["turn"], v["node"]) for v in kept] == [
            (3, "three", "edge-north"),
            (2, "two", "edge-north"),
            (1, "one", "edge-north"),
        ]
        assert kept[0]["made_ms"] >= kept[1]["made_ms"] > 0
        assert kept[0]["bytes"] == len("one\ntwo\nthree\n")
        assert "three" in await roost(mesh, "state", "log", "probe", "--user", "ana")

        # While it is live: its process has to go.
        process = (await ana.send("process")).text
        assert await state(mesh, "restore", "2") == {"version": 5, "epoch": 2}
        reply = await ana.send("append four")
        assert json.loads(reply.text) == ["one", "two", "four"]
        assert (reply.receipt.epoch, reply.receipt.version, reply.receipt.node) == (2, 6, "edge-north")
        assert (await ana.send("process")).text != process

        # What was applied stays applied, though what it did was undone.
        again = await ana.send("append three", turn_id="three")
        assert (json.loads(again.text), again.receipt.replayed) == (["one", "two", "three"], True)
        assert json.loads((await ana.send("lines")).text) == ["one", "two", "four"]

    assert "is not kept" in await roost(mesh, "state", "restore", "probe", "--user", "ana", "99", code=1)
    file = tmp_path / "ana.tar"
    assert (await state(mesh, "export", str(file), "--version", "3"))["version"] == 3
    with tarfile.open(file) as tar:
        assert tar.extractfile("lines").read() == b"one\ntwo\nthree\n"  # type: ignore[union-attr]

    # Into one that there was not, and into one that there is.
    assert await state(mesh, "import", str(file), user="ben") == {"version": 1, "epoch": 1}
    async with mesh.client(OSLO) as client, client.attach("probe", "ben") as ben:
        reply = await ben.send("append mine")
        assert json.loads(reply.text) == ["one", "two", "three", "mine"]
        assert (reply.receipt.epoch, reply.receipt.version, reply.receipt.resumed_from) == (2, 2, "blobs")
        assert (await state(mesh, "import", str(file), user="ben"))["version"] == 3
        assert json.loads((await ben.send("lines")).text) == ["one", "two", "three"]
    kept = (await state(mesh, "log", user="ben"))["versions"]
    assert [v["version"] for v in kept] == [4, 3, 2, 1]
    assert kept[1]["note"] == "imported from ana.tar"


async def test_an_import_is_as_safe_as_what_an_agent_writes(mesh: Mesh, tmp_path: Path) -> None:
    file = tmp_path / "evil.tar"
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("../../escaped"))
    file.write_bytes(out.getvalue())
    told = await roost(mesh, "state", "import", "probe", "--user", "eve", str(file), code=1)
    assert "leads out" in told
    os.truncate(file, 0)
    assert "no tar archive" in await roost(
        mesh, "state", "import", "probe", "--user", "eve", str(file), code=1
    )
    assert await mesh.instance("probe", "eve") is None


async def test_damage_is_found_and_mended_from_the_nodes_copies(tmp_path: Path) -> None:
    """Two coordinators: the node that has the copies may be linked to either."""
    async with running_mesh(tmp_path, [NORTH, SOUTH], coordinators=2) as mesh:
        await mesh.deploy(PROBE)
        async with mesh.client(OSLO) as client, client.attach("probe", "ana") as ana:
            await ana.send("fill large 2")
            await ana.send("append one")
            assert (await state(mesh, "check"))["damage"] == []
            chunks = [p for p in (mesh.directory / "blobs" / "chunks").glob("*/*") if p.is_file()]
            kept = (await state(mesh, "log"))["versions"]
            blobs = {p.name: p for p in chunks}
            victims = sorted(chunks, key=lambda p: p.stat().st_size)[-3:]  # of "large": all else is small
            victims[0].unlink()
            victims[1].write_bytes(victims[1].read_bytes()[:-7])
            os.truncate(victims[2], 0)
            blobs[kept[0]["root"]].unlink()
            told = await roost(mesh, "state", "check", "probe", "--user", "ana", code=1)
            assert "its list of files" in told

            told = json.loads(await roost(mesh, "state", "repair", "probe", "--user", "ana", "--json"))
            assert (told["repaired"], told["damage"]) == (4, [])
            assert (await state(mesh, "check"))["damage"] == []

            # What no node has any more stays damaged, and is told of by name.
            for node in ("edge-north", "edge-south"):
                (copy,) = [*(mesh.data_dir(node) / "daemon" / "chunks").glob(f"*/{victims[0].name}")] or [
                    None
                ]
                if copy is not None:
                    copy.unlink()
            victims[0].unlink()
            asked = ("state", "check", "probe", "--user", "ana", "--json")
            told = json.loads((await roost(mesh, *asked, code=1)).splitlines()[0])
            assert told["damage"] == [{"hash": victims[0].name, "what": "missing", "of": ["large"]}]


async def test_a_tenant_has_no_more_than_its_quota(mesh: Mesh, tmp_path: Path) -> None:
    async with mesh.client(OSLO) as client:
        async with client.attach("probe", "ana") as ana:
            await ana.send("fill one 1")
            told = json.loads(
                await roost(mesh, "quota", "default", "--bytes", "2M", "--instances", "1", "--json")
            )
            assert told == {
                "state_bytes": 2 << 20,
                "instances": 1,
                "used_bytes": 1 << 20,
                "used_instances": 1,
            }
            with pytest.raises(RoostError) as caught:
                await ana.send("fill two 2")
            assert (caught.value.reason, bool(caught.value.hint)) == (Reason.TENANT_QUOTA, True)
            assert json.loads((await ana.send("ls /state")).text) == ["one"], "as it was before"
            await ana.send("fill one 1")
            with pytest.raises(RoostError) as caught:
                await client.attach("probe", "ben").send("lines")
            assert caught.value.reason is Reason.TENANT_QUOTA
            file = tmp_path / "ana.tar"
            await state(mesh, "export", str(file))
            refused = await roost(mesh, "state", "import", "probe", "--user", "ben", str(file), code=1)
            assert "1 instances" in refused
            await roost(mesh, "quota", "default", "--bytes", "0", "--instances", "2")
            await ana.send("fill two 2")
            await state(mesh, "import", str(file), user="ben")
    assert "2 instances of 2" in await roost(mesh, "quota", "default")


async def collect(mesh: Mesh, *args: str) -> Any:
    return json.loads(await roost(mesh, "state", "gc", "--json", *args))


async def test_collecting_while_turns_are_committed_loses_nothing(tmp_path: Path) -> None:
    """Many rounds with no grace, beside turns that bring the same chunks again and again and drop them."""
    gc = '[gc]\nevery = "0s"\ngrace = "0s"'
    async with running_mesh(tmp_path, [NORTH, SOUTH], coordinators=2, coordinator_toml=gc) as mesh:
        shutil.copytree(PROBE, tmp_path / "probe")
        with (tmp_path / "probe" / "agent.toml").open("a") as file:
            file.write("history = 2\n")
        await mesh.deploy(tmp_path / "probe")
        async with mesh.client(OSLO) as client:

            async def talk(user: str) -> None:
                async with client.attach("probe", user) as chat:
                    for i in range(TURNS):
                        await chat.send(f"fill junk-{i % 3} 1")
                        assert json.loads((await chat.send(f"append {i}")).text) == [
                            str(n) for n in range(i + 1)
                        ]

            talking = asyncio.create_task(asyncio.wait_for(talk("ana"), 60))
            other = asyncio.create_task(asyncio.wait_for(talk("ben"), 60))
            reports = []
            while not (talking.done() and other.done()):
                reports.append(await collect(mesh))
            await talking
            await other
            assert len(reports) >= 4
            assert sum(report["purged"] for report in reports) > 20, "it was worth it"
            for user in ("ana", "ben"):
                await state(mesh, "log", user=user)  # which brings what commits carried to the blob store
            await collect(mesh)
            report = await collect(mesh)
            assert (report["missing"], report["needed"]) == (0, report["blobs"])
            assert (await collect(mesh, "--dry-run"))["condemned"] == 0
            assert (await mesh.status()).collection.round == len(reports) + 2
            assert "blob store:" in await roost(mesh, "status")

            await mesh.drain("edge-north")  # whose copies are of no use elsewhere
            for user in ("ana", "ben"):
                kept = (await state(mesh, "log", user=user))["versions"]
                assert len(kept) == 2
                await state(
                    mesh, "export", str(tmp_path / "x.tar"), "--version", str(kept[-1]["version"]), user=user
                )
                async with client.attach("probe", user) as chat:
                    reply = await chat.send("lines")
                assert len(json.loads(reply.text)) == TURNS
                assert (reply.receipt.node, reply.receipt.resumed_from) == ("edge-south", "blobs")


async def test_a_restore_while_turns_are_under_way_comes_before_or_after_each(mesh: Mesh) -> None:
    """No turn is lost or doubled by it; each restore undoes what came after its version."""
    async with mesh.client(OSLO) as client, client.attach("probe", "ana") as ana:
        await ana.send("append base")

        async def talk() -> list[list[str]]:
            return [json.loads((await ana.send(f"slow-append 0.5 n{i}")).text) for i in range(4)]

        talking = asyncio.create_task(talk())
        for _ in range(4):
            await roost(mesh, "state", "restore", "probe", "--user", "ana", "1")
        for i, lines in enumerate(await talking):
            assert lines[0] == "base"
            assert lines[-1] == f"n{i}"
            assert len(lines) == len(set(lines))
    kept = (await state(mesh, "log"))["versions"]
    assert [v["version"] for v in kept] == list(range(9, 0, -1)), "each turn and each restore is one version"
