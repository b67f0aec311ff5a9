"""Whatever goes in or goes wrong: a clear error with a hint, in time; nothing lost; the daemon lives."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc.aio
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from protos.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    attach_pb2,
    attach_pb2_grpc,
    common_pb2,
    resolver_pb2,
    resolver_pb2_grpc,
)
from shared import rpc
from shared.errors import Reason, RoostError, from_rpc
from shared.identity import InstanceKey, Ticket, sign_ticket
from tests.support.eventually import eventually
from tests.support.mesh import AGENTS, CLOUD, NORTH, Mesh, NodeSpec, running_mesh

PROBE = AGENTS / "probe"
SMALL = NodeSpec("edge-small", memory="100M")  # room for one probe


@asynccontextmanager
async def refused(*reasons: Reason, within: float = 10.0) -> AsyncIterator[None]:
    """The block ends with this error, with a message and a hint, in time."""
    begun = time.monotonic()
    with pytest.raises(RoostError) as caught:
        yield
    assert caught.value.reason in reasons, caught.value
    assert caught.value.message
    assert caught.value.hint, caught.value
    assert time.monotonic() - begun < within


async def resolve(mesh: Mesh, user: str, agent: str = "probe") -> resolver_pb2.ResolveReply:
    async with rpc.channel(mesh.addresses[0]) as channel:
        request = resolver_pb2.ResolveRequest(key=InstanceKey("default", agent, user).to_proto())
        return await resolver_pb2_grpc.ResolverStub(channel).Resolve(request, timeout=5.0)


async def attach(address: str, *requests: attach_pb2.AttachRequest) -> list[attach_pb2.AttachReply]:
    """What a node says to these requests, sent by a client that checks nothing itself."""
    async with rpc.channel(address) as channel:
        call = attach_pb2_grpc.AttachStub(channel).Attach(timeout=10.0)
        replies = []
        try:
            for request in requests:
                await call.write(request)
                while isinstance(reply := await call.read(), attach_pb2.AttachReply):
                    replies.append(reply)
                    if reply.WhichOneof("kind") not in ("delta", "waiting"):
                        break
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error, Reason.NODE_UNREACHABLE, "the node") from error
        return replies


def hello(ticket: bytes) -> attach_pb2.AttachRequest:
    return attach_pb2.AttachRequest(hello=attach_pb2.Hello(ticket=ticket))


def turn(message: str, id: str = "t-1") -> attach_pb2.AttachRequest:
    return attach_pb2.AttachRequest(turn=attach_pb2.Turn(id=id, message=message))


async def test_agents_that_misbehave(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, [NORTH]) as mesh:
        await mesh.deploy(PROBE, turn_timeout='"2s"')
        daemon = mesh.daemon("edge-north").pid
        async with mesh.client() as client, client.attach("probe", "ana") as ana:
            await ana.send("append one")
            for message, reason in (
                ("append-then-raise bad", Reason.TURN_FAILED),
                ("append-then-exit bad", Reason.AGENT_CRASHED),
                ("eat memory", Reason.AGENT_OUT_OF_MEMORY),
                ("sleep 60", Reason.TURN_TIMEOUT),
                ("garbage", Reason.AGENT_CRASHED),
                (f"huge {(1 << 20) + 1}", Reason.TURN_FAILED),
                ("no-such-command", Reason.TURN_FAILED),
            ):
                async with refused(reason):
                    await ana.send(message)
                reply = await ana.send("lines")
                assert json.loads(reply.text) == ["one"], f"after {message}"
            assert (await ana.send("exit-soon")).text == "bye"
            await asyncio.sleep(0.5)  # it ends between turns, which is nobody's fault
            assert json.loads((await ana.send("append two")).text) == ["one", "two"]
        assert mesh.daemon("edge-north").pid == daemon


async def test_agents_that_can_not_start(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, [NORTH]) as mesh:
        for name, code, reason in (
            ("import", "import no_such_module\n", Reason.AGENT_START_FAILED),
            ("syntax", "def\n", Reason.AGENT_START_FAILED),
            ("absent", "x = 1\n", Reason.AGENT_START_FAILED),
            ("silent", "import time\ntime.sleep(60)\n", Reason.AGENT_START_FAILED),
        ):
            agent = tmp_path / name
            agent.mkdir()
            (agent / "bad.py").write_text(code)
            (agent / "agent.toml").write_text(
                f'[agent]\nname = "{name}"\n[run]\nentry = "bad:agent"\nstart_timeout = "2s"\n'
            )
            await mesh.deploy(agent)
            async with mesh.client() as client, client.attach(name, "ana") as ana:
                async with refused(reason):
                    await ana.send("hi")
        # And it is well the moment that a good version is there.
        agent = tmp_path / "import"
        shutil.copy(PROBE / "probe.py", agent / "bad.py")
        await mesh.deploy(agent)
        async with mesh.client() as client, client.attach("import", "ana") as ana:
            assert (await ana.send("echo well")).text == "well"


async def test_agents_that_do_not_exist_or_are_no_agents(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, [NORTH]) as mesh:
        async with mesh.client() as client, client.attach("nobody", "ana") as ana:
            async with refused(Reason.AGENT_UNKNOWN):
                await ana.send("hi")
        for key, value, words in (
            ("memory", '"64 bananas"', "memory"),
            ("cpu", '"much"', "cpu"),
            ("entry", '"probe"', "entry"),
            ("entry", '"missing:agent"', "missing"),
            ("pids", "-1", "pids"),
            ("name", '"Not A Name"', "name"),
            ("cpu", "1.0\nspeed = 9", "unknown key 'speed'"),
        ):
            with pytest.raises(RoostError, match=words) as caught:
                await mesh.deploy(PROBE, **{key: value})
            assert caught.value.reason is Reason.AGENT_INVALID
            assert caught.value.hint
        # The coordinator does not rely on the client's checks.
        async with rpc.channel(mesh.addresses[0]) as channel:
            spec = common_pb2.AgentSpec(
                tenant="default",
                name="probe",
                version="1",
                policy_toml="[agent]\nname = 5",
                bundle_root="0" * 64,
            )
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                await admin_pb2_grpc.AdminStub(channel).Deploy(
                    admin_pb2.DeployRequest(agent=spec), timeout=5.0
                )
            assert from_rpc(failed.value, Reason.INTERNAL, "").reason is Reason.AGENT_INVALID


async def test_tickets_that_permit_nothing(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, [NORTH, CLOUD]) as mesh:
        await mesh.deploy(PROBE)
        place = await resolve(mesh, "ana")
        key = InstanceKey("default", "probe", "ana")
        signed = resolver_pb2.SignedTicket.FromString(place.ticket)
        stolen = resolver_pb2.Ticket.FromString(signed.ticket)
        stolen.key.user = "ben"
        signed.ticket = stolen.SerializeToString()
        mine = Ed25519PrivateKey.generate()
        forged = sign_ticket(Ticket(key, place.node, place.epoch, "v", time.time() + 60), mine)
        for bad in (b"", b"garbage" * 9, forged, signed.SerializeToString()):
            async with refused(Reason.TICKET_INVALID):
                await attach(place.address, hello(bad), turn("lines"))
        real = Ed25519PrivateKey.from_private_bytes(await mesh.signing_key())
        expired = sign_ticket(Ticket(key, place.node, place.epoch, "v", time.time() - 1), real)
        async with refused(Reason.TICKET_EXPIRED):
            await attach(place.address, hello(expired))
        cloud = {n.node.id: n.node.address for n in (await mesh.status()).nodes}["cloud-1"]
        async with refused(Reason.TICKET_WRONG_NODE):
            await attach(cloud, hello(place.ticket))
        async with refused(Reason.BAD_REQUEST):
            await attach(place.address, turn("no hello"))
        replies = await attach(place.address, hello(place.ticket), turn("append one"))
        assert replies[-1].committed.reply == '["one"]'


async def test_a_client_that_says_nothing_is_not_waited_for(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, [NORTH]) as mesh:
        address = (await mesh.status()).nodes[0].node.address
        async with rpc.channel(address) as channel, refused(Reason.DEADLINE):
            call = attach_pb2_grpc.AttachStub(channel).Attach(timeout=30.0)
            try:
                await call.read()
            except grpc.aio.AioRpcError as error:
                raise from_rpc(error, Reason.NODE_UNREACHABLE, "the node") from error


async def test_messages_that_are_too_large(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, [NORTH]) as mesh:
        await mesh.deploy(PROBE)
        async with mesh.client() as client, client.attach("probe", "ana") as ana:
            async with refused(Reason.MESSAGE_TOO_LARGE):
                await ana.send("echo " + "x" * (1 << 20))
            largest = "x" * ((1 << 20) - len("echo "))
            assert (await ana.send("echo " + largest)).text == largest
        place = await resolve(mesh, "ana")
        replies = await attach(
            place.address, hello(place.ticket), turn("x" * (1 << 20) + "y"), turn("lines", "t-2")
        )
        assert RoostError.from_proto(replies[1].failed.error).reason is Reason.MESSAGE_TOO_LARGE
        assert replies[2].committed.reply == "[]"  # the stream goes on
        # One that no client of ours could send: refused by the transport, and the node goes on.
        with pytest.raises(RoostError):
            await attach(place.address, hello(place.ticket), turn("x" * (9 << 20)))
        replies = await attach(place.address, hello(place.ticket), turn("lines", "t-3"))
        assert replies[-1].committed.reply == "[]"


async def test_a_full_node_and_a_full_mesh(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, [SMALL, NodeSpec("cloud-1", role="cloud", memory="100M")]) as mesh:
        await mesh.deploy(PROBE, idle_timeout='"2s"')
        async with mesh.client() as client:
            async with client.attach("probe", "ana") as ana:
                assert (await ana.send("append one")).receipt.node == "edge-small"
            async with client.attach("probe", "ben") as ben:
                reply = await ben.send("append one")
                assert reply.receipt.node == "cloud-1"
                assert "edge-small is full" in reply.why
            async with client.attach("probe", "cy") as cy:
                async with refused(Reason.NO_ROOM):
                    await cy.send("append one", timeout=1.0)
                # Room comes back when the idle hibernate.
                assert json.loads((await cy.send("append one", timeout=20.0)).text) == ["one"]


async def test_etcd_is_down(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, [NORTH]) as mesh:
        await mesh.deploy(PROBE)
        async with mesh.client() as client:
            async with client.attach("probe", "ana") as ana, client.attach("probe", "ben") as ben:
                await ana.send("append one")
                await mesh.etcd.stop()
                async with refused(Reason.TURN_NOT_COMMITTED, Reason.STORE_UNAVAILABLE, within=30.0):
                    await ana.send("append two", turn_id="t-2", timeout=14.0)
                async with refused(Reason.STORE_UNAVAILABLE, within=10.0):
                    await ben.send("append one", timeout=3.0)
                await mesh.etcd.start()
                await mesh.wait_up("edge-north")
                reply = await ana.send("append two", turn_id="t-2")
                assert json.loads(reply.text) == ["one", "two"]
                assert json.loads((await ben.send("append one")).text) == ["one"]


async def test_a_daemon_told_nonsense_by_its_configuration(tmp_path: Path) -> None:
    from tests.support.process import Process

    for module, text, words in (
        ("edge_agent", 'node = "x"\ndata_dir = "/tmp/x"\nspeed = 1\n', "unknown key 'speed'"),
        ("edge_agent", 'node = "x"\n', "data_dir is missing"),
        ("edge_agent", "node = ", "not valid TOML"),
        ("coordinator", 'id = "c"\netcd = ["a:1"]\nblobs = "file:///x"\nnode_ttl = "6"\n', "node_ttl"),
    ):
        path = tmp_path / "bad.toml"
        path.write_text(text)
        process = Process(module, ["--config", str(path)], tmp_path / "log")
        await process.start()
        await eventually(lambda p=process: not p.running, 10.0, f"{module} to end")
        assert words in process.log()
        assert "Traceback" not in process.log()
