"""Agents that bring packages: from requirements.txt to the reply, without an index anywhere."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from roost.cli.deploy import deploy
from roost.client import AsyncChat, Reply, Waiting
from shared.errors import Reason, RoostError
from shared.wheels import Platform
from tests.support.eventually import eventually
from tests.support.mesh import CLOUD, NORTH, Mesh, running_mesh
from tests.support.wheels import make_wheel

AGENT = """
from pathlib import Path
import flour
from roost import Agent
agent = Agent()
@agent.turn
def bake(turn):
    turn.state["baked"] = turn.state.get("baked", 0) + 1
    try:
        Path("/packages/mine").touch()
    except OSError as error:
        sealed = error.strerror
    compiled = Path(flour.__cached__).exists()
    return f"{flour.bread()}, {turn.state['baked']}, {sealed}, {compiled}"
"""
BREAD = "bread of wheat, 1, Read-only file system, True"


@pytest.fixture(autouse=True)
def _own_cache_and_no_index(tmp_path: Path) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(XDG_CACHE_HOME=str(tmp_path / "cache"), PIP_NO_INDEX="1", PIP_CONFIG_FILE=os.devnull)
    os.environ.pop("PIP_FIND_LINKS", None)
    yield
    os.environ.clear()
    os.environ.update(before)


def agent(directory: Path, name: str = "baker", more: str = "", code: str = AGENT) -> Path:
    root = directory / name
    root.mkdir(parents=True)
    (root / "agent.toml").write_text(f'[agent]\nname = "{name}"\n[run]\nentry = "baker:agent"\n{more}\n')
    (root / "baker.py").write_text(code)
    return root


def with_requirements(directory: Path, more: str = "") -> Path:
    root = agent(directory, more=more)
    (root / "requirements.txt").write_text("# what it needs\nflour\n")
    make_wheel(root / "wheels", "flour", {"flour/__init__.py": FLOUR}, needs=("wheat>=1",))
    make_wheel(root / "wheels", "wheat", {"wheat.py": "name = 'wheat'\n"})
    make_wheel(root / "wheels", "unneeded", {"unneeded.py": ""})
    return root


FLOUR = "import wheat\ndef bread(): return f'bread of {wheat.name}'\n"


async def said(chat: AsyncChat, message: str) -> tuple[list[str], str]:
    waited: list[str] = []
    async for event in chat.stream(message):
        match event:
            case Waiting(text):
                waited.append(text)
            case Reply(text):
                return waited, text
    raise AssertionError("no reply")


def prepared(mesh: Mesh, node: str) -> list[Path]:
    return sorted((mesh.data_dir(node) / "jails").glob("packages-*"))


async def test_requirements_are_prepared_once_for_two_users_who_come_at_once(tmp_path: Path) -> None:
    async with running_mesh(tmp_path / "mesh", [NORTH]) as mesh:
        await mesh.deploy(with_requirements(tmp_path))
        async with mesh.client() as client:
            async with client.attach("baker", "ana") as ana, client.attach("baker", "ben") as ben:
                both = await asyncio.gather(said(ana, "bake"), said(ben, "bake"))
                for waited, reply in both:
                    assert reply == BREAD
                    assert any("of 2 packages" in text or "compiling" in text for text in waited), waited
                (packages,) = prepared(mesh, "edge-north")
                assert mesh.nodes["edge-north"].log().count("packages of baker") == 1
                assert not list(packages.rglob("unneeded*")), "only what is required was brought"
                # By another way: a zygote has them too, and so has what it forks.
                await eventually(lambda: "is ready after" in mesh.nodes["edge-north"].log(), 20.0)
                async with client.attach("baker", "cleo") as cleo:
                    assert await said(cleo, "bake") == ([], BREAD)
                await mesh.nodes["edge-north"].stop()
                await mesh.nodes["edge-north"].start()
                await mesh.wait_up("edge-north")
                assert prepared(mesh, "edge-north") == [packages], "they outlive the node's restart"
                waited, reply = await said(ana, "bake")
                assert (waited, reply[:20]) == ([], "bread of wheat, 2, R")


async def test_deploying_again_gives_the_same_version(tmp_path: Path) -> None:
    async with running_mesh(tmp_path / "mesh", [NORTH]) as mesh:
        root = with_requirements(tmp_path)
        first = await deploy(mesh.addresses, "default", root, lambda text: None)
        again = await deploy(mesh.addresses, "default", root, lambda text: None)
        assert (again.reply.version, again.reply.changed) == (first.reply.version, False)


async def test_kill_9_in_the_midst_of_preparing(tmp_path: Path) -> None:
    async with running_mesh(tmp_path / "mesh", [NORTH]) as mesh:
        root = with_requirements(tmp_path)
        for i in range(40):  # takes a while
            code = "\n".join(f"def f{j}(a, b): return [a + b * {j} for a in range({i})]" for j in range(300))
            make_wheel(root / "wheels", f"grain{i}", {f"grain{i}.py": code})
        (root / "requirements.txt").write_text("flour\n" + "".join(f"grain{i}\n" for i in range(40)))
        await mesh.deploy(root)
        async with mesh.client() as client, client.attach("baker", "ana") as ana:
            turn = asyncio.create_task(said(ana, "bake"))
            await eventually(lambda: "of 42 packages" in mesh.nodes["edge-north"].log(), 20.0)
            (half,) = prepared(mesh, "edge-north")
            mesh.daemon("edge-north").kill()
            assert (await turn)[1] == BREAD
            (whole,) = prepared(mesh, "edge-north")
            assert whole != half, "what was half prepared is not used, nor left behind"
            # And of the whole node, so that nobody is there to clean up.
            await mesh.nodes["edge-north"].kill()
            await mesh.nodes["edge-north"].start()
            await mesh.wait_up("edge-north")
            assert prepared(mesh, "edge-north") == [whole]


async def test_a_broken_wheel_is_named_and_the_next_version_works(tmp_path: Path) -> None:
    async with running_mesh(tmp_path / "mesh", [NORTH, CLOUD]) as mesh:
        root = agent(tmp_path)
        make_wheel(root / "wheels", "wheat", {"wheat.py": "name = 'wheat'\n"})
        (root / "wheels" / "flour-1-py3-none-any.whl").write_bytes(b"not flour")
        await mesh.deploy(root)
        async with mesh.client() as client, client.attach("baker", "ana") as ana:
            with pytest.raises(RoostError) as caught:
                await ana.send("bake")
            assert caught.value.reason is Reason.AGENT_PREPARE_FAILED
            assert "wheels/flour-1-py3-none-any.whl: File is not a zip file" in caught.value.message
            await eventually(lambda: not prepared(mesh, "edge-north"), 5.0, "it leaves nothing behind")
            (root / "wheels" / "flour-1-py3-none-any.whl").unlink()
            make_wheel(root / "wheels", "flour", {"flour.py": FLOUR})
            shutil.rmtree(tmp_path / "mesh" / "agents")
            await mesh.deploy(root)
            assert (await ana.send("bake")).text == BREAD


async def test_a_package_for_other_nodes_is_named(tmp_path: Path) -> None:
    async with running_mesh(tmp_path / "mesh", [NORTH]) as mesh:
        root = agent(tmp_path)
        make_wheel(root / "wheels", "flour", {"flour.py": FLOUR}, tag="cp38-cp38-manylinux2014_s390x")
        await mesh.deploy(root)
        async with mesh.client() as client, client.attach("baker", "ana") as ana:
            with pytest.raises(RoostError, match=r"flour-1\.0-cp38-cp38-manylinux2014_s390x") as caught:
                await ana.send("bake")
            assert caught.value.reason is Reason.AGENT_PREPARE_FAILED
            assert str(Platform.here()) in caught.value.message


@pytest.mark.parametrize("where", ["site-packages", "venv/lib/python{}.{}/site-packages"])
async def test_packages_that_were_installed_into_the_agents_directory(tmp_path: Path, where: str) -> None:
    async with running_mesh(tmp_path / "mesh", [NORTH]) as mesh:
        root = agent(tmp_path)
        packages = root / where.format(*Platform.here().python)
        packages.mkdir(parents=True)
        (packages / "flour.py").write_text(FLOUR)
        (packages / "wheat.py").write_text("name = 'wheat'\n")
        if where.startswith("venv"):
            (root / "venv" / "pyvenv.cfg").write_text("home = /usr/bin\n")
            (root / "venv" / "bin").mkdir()
            (root / "venv" / "bin" / "python").symlink_to("/usr/bin/python3")
        await mesh.deploy(root)
        async with mesh.client() as client, client.attach("baker", "ana") as ana:
            assert (await ana.send("bake")).text == BREAD


async def test_a_program_finds_them_as_well(tmp_path: Path) -> None:
    code = """
import flour
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        self.send_response(200); self.end_headers(); self.wfile.write(flour.bread().encode())
HTTPServer(("127.0.0.1", 8080), Handler).serve_forever()
"""
    async with running_mesh(tmp_path / "mesh", [NORTH]) as mesh:
        root = with_requirements(tmp_path)
        toml = '[agent]\nname = "baker"\n[run]\ncommand = ["python", "baker.py"]\nport = 8080\n'
        (root / "agent.toml").write_text(toml)
        (root / "baker.py").write_text(code)
        await mesh.deploy(root)
        async with mesh.client() as client, client.attach("baker", "ana") as ana:
            assert (await ana.send("bake")).text == "bread of wheat"


async def test_what_cannot_be_had_is_said_when_it_is_deployed(tmp_path: Path) -> None:
    async with running_mesh(tmp_path / "mesh", [NORTH]) as mesh:
        root = agent(tmp_path)
        (root / "requirements.txt").write_text("no-such-flour==3\n")
        with pytest.raises(RoostError, match="no-such-flour==3") as caught:
            await mesh.deploy(root)
        assert caught.value.reason is Reason.AGENT_INVALID
