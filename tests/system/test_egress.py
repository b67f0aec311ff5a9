"""Egress in a whole mesh: each way to start, the operator's credentials, nothing from who is no owner."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from roost.client import AsyncChat
from tests.support.eventually import eventually
from tests.support.mesh import CLOUD, NORTH, TTL, Mesh, NodeSpec, running_mesh
from tests.support.web import Authority, Web, running_web

SECRET = "sk-very-secret-0123456789"

MODULE = """
import json, urllib.error, urllib.request
from roost import Agent
agent = Agent()
opener = urllib.request.build_opener()  # which looks at the environment here and now: when it is imported

@agent.turn
def ask(turn):
    try:
        with opener.open(turn.message, timeout=20) as answer:
            return answer.read().decode()
    except urllib.error.HTTPError as error:
        return json.dumps([error.code, json.loads(error.read())["reason"]])
    except OSError as error:
        return json.dumps(["failed", type(error).__name__])
"""


@dataclass
class World:
    mesh: Mesh
    web: Web
    tls: Web

    async def deploy(self, directory: Path, name: str = "asker", start: str = "auto") -> None:
        root = directory / f"agent-{name}"
        root.mkdir(exist_ok=True)
        (root / "asker.py").write_text(MODULE)
        (root / "agent.toml").write_text(f"""
[agent]
name = "{name}"
[run]
entry = "asker:agent"
start = "{start}"
turn_timeout = "40s"
[[network.upstream]]
name = "web"
url = "http://127.0.0.1:{self.web.port}"
[[network.upstream]]
name = "llm"
url = "https://127.0.0.1:{self.tls.port}/v1"
credential = "model"
""")
        await self.mesh.deploy(root)


@asynccontextmanager
async def running(directory: Path, *nodes: NodeSpec) -> AsyncIterator[World]:
    authority = Authority(directory)
    certificate = authority.certificate("127.0.0.1")
    secrets = directory / "secrets"
    secrets.mkdir(mode=0o700)
    (secrets / "model").write_text(SECRET)
    (secrets / "model").chmod(0o400)
    authority.file.chmod(0o400)
    async with running_web() as web, running_web(certificate) as tls:
        more = f"""
[egress]
credentials_dir = "{secrets}"
ca_file = "{authority.file}"
private_networks = ["127.0.0.0/8"]
[[egress.credential]]
name = "model"
url = "https://127.0.0.1:{tls.port}/v1"
agents = ["default/asker"]
"""
        async with running_mesh(directory / "mesh", [replace(node, more=more) for node in nodes]) as mesh:
            yield World(mesh, web, tls)


async def ask(chat: AsyncChat, url: str) -> str:
    return (await chat.send(url)).text


async def test_egress_works_in_every_way_to_start_and_credentials_are_added(tmp_path: Path) -> None:
    async with running(tmp_path, NORTH) as world:
        await world.deploy(tmp_path)
        log = world.mesh.nodes["edge-north"].log
        async with world.mesh.client() as client:
            for user in ("ana", "ben", "cleo"):  # executed, then parked
                async with client.attach("asker", user) as chat:
                    assert await ask(chat, "http://web.roost/x") == "hello"
                    told = json.loads(await ask(chat, "http://llm.roost/headers"))
                    assert told["authorization"] == "Bearer " + "*" * len(SECRET)
                    assert world.tls.seen[-1].headers["authorization"] == f"Bearer {SECRET}"
                    assert world.tls.seen[-1].target == "/v1/headers"
                    refused = await ask(chat, "http://evil.example/")
                    assert json.loads(refused) == [403, "HOST_DENIED"]
                await eventually(lambda: "zygote of" in log(), 20.0)
                await asyncio.sleep(1.5)  # a jail is parked
            assert "default/asker/cleo: parked" in log()
            await world.deploy(tmp_path, "thief")
            async with client.attach("thief", "mallory") as chat:
                assert json.loads(await ask(chat, "http://llm.roost/x")) == [403, "CREDENTIAL_DENIED"]
        assert "egress default/asker/ben: allowed GET http://web.roost:80/x" in log()
        assert SECRET not in log()


async def _downloading(world: World, chat: AsyncChat) -> asyncio.Task[str]:
    turn = asyncio.create_task(ask(chat, "http://web.roost/endless"))
    await eventually(lambda: world.web.endless_bytes > 10_000, 20.0, "a download under way")
    return turn


async def test_a_download_is_cut_when_another_node_gets_the_instance(tmp_path: Path) -> None:
    async with running(tmp_path, NORTH, CLOUD) as world:
        await world.deploy(tmp_path)
        async with world.mesh.client() as client, client.attach("asker", "ana") as chat:
            assert await ask(chat, "http://web.roost/x") == "hello"
            turn = await _downloading(world, chat)
            assert world.web.open_now == 1
            await world.mesh.take_away("asker", "ana")
            await eventually(lambda: world.web.open_now == 0, 2.0, "the end of the old owner's download")
            turn.cancel()


async def test_a_download_is_cut_when_the_node_does_not_know_any_more_who_owns_it(tmp_path: Path) -> None:
    async with running(tmp_path, NORTH) as world:
        await world.deploy(tmp_path)
        async with world.mesh.client() as client, client.attach("asker", "ana") as chat:
            turn = await _downloading(world, chat)
            world.mesh.coordinators[0].suspend()
            try:
                await eventually(lambda: world.web.open_now == 0, TTL, "the end of the download")
                passed = world.web.endless_bytes
                await asyncio.sleep(0.5)
                assert world.web.endless_bytes == passed
            finally:
                world.mesh.coordinators[0].resume()
            await world.mesh.wait_up("edge-north")
            turn.cancel()


async def test_an_instance_that_the_next_daemon_adopts_has_its_egress(tmp_path: Path) -> None:
    async with running(tmp_path, NORTH) as world:
        await world.deploy(tmp_path)
        async with world.mesh.client() as client:
            async with client.attach("asker", "ana") as chat:
                assert await ask(chat, "http://web.roost/x") == "hello"
            await world.mesh.between_turns("edge-north")
            world.mesh.daemon("edge-north").kill()
            await eventually(lambda: world.mesh.nodes["edge-north"].log().count("serves at") == 2, 20.0)
            await world.mesh.wait_up("edge-north")
            async with client.attach("asker", "ana") as chat:
                reply = await chat.send("http://web.roost/x")
            assert (reply.text, reply.receipt.resumed_from) == ("hello", "live")
