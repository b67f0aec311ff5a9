"""Clients of one node in this process: the attach service and all behind it, without gRPC and jails."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_agent.attach import AttachServicer
from edge_agent.commits import Commits
from edge_agent.control import Agent
from edge_agent.state.blobs import MemoryBlobs
from edge_agent.supervisor import Supervisor
from protos.v1 import attach_pb2, common_pb2, errors_pb2
from shared.content import Blob
from shared.errors import RoostError
from shared.identity import InstanceKey, Ticket, sign_ticket
from tests.support.eventually import eventually
from tests.support.fake_control import POLICY, Owned
from tests.support.fake_jails import FakeAgent
from tests.unit.edge_agent.test_instance import Bench

ANA = InstanceKey("default", "probe", "ana")
_SECONDS = 30.0  # for what must come; a busy machine may need some


@dataclass
class Agents:
    """What the agent does: each message becomes a line of its state, and all of them are the reply. With
    `wait` in the message it first says `so far`, and goes on when it is let."""

    let: asyncio.Event = field(default_factory=asyncio.Event)
    begun: list[str] = field(default_factory=list)  # messages

    async def program(self, agent: FakeAgent) -> None:
        await agent.send(b'{"kind": "ready"}')
        while True:
            turn = json.loads(await agent.receive())
            message, lines = turn["message"], agent.state / "lines"
            self.begun.append(message)
            with lines.open("a") as f:
                f.write(message + "\n")
            if "wait" in message:
                await self._send(agent, turn, "delta", "so far")
                await self.let.wait()
            if "fail" in message:
                await self._send(agent, turn, "error", "told to")
                continue
            reply = ",".join(lines.read_text().split())
            await self._send(agent, turn, "delta", reply)
            await self._send(agent, turn, "reply", reply)

    async def _send(self, agent: FakeAgent, turn: dict[str, str], kind: str, text: str) -> None:
        name = "message" if kind == "error" else "text"
        await agent.send(json.dumps({"kind": kind, "id": turn["id"], name: text}).encode())


@dataclass
class Commit:
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    let: asyncio.Event = field(default_factory=asyncio.Event)


class Node:
    """Its commits wait long for what they need, unless told otherwise."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.agents = Agents()
        bench.jails.program = self.agents.program
        bench.control.owned = {ANA: Owned(1)}
        bench.control.takes_inline = False  # so that a commit can be held at the blob store
        self.become("committed")
        self.wait_for_commits(_SECONDS)
        self._key = Ed25519PrivateKey.generate()
        self._clients: list[Client] = []
        self._held: list[Commit] = []
        self.restart()

    def become(self, durability: str, turn_timeout: str = "30s") -> None:
        """As the agent's policy says from the next start on."""
        text = POLICY.replace('"1s"', f'"{turn_timeout}"') + f'[state]\ndurability = "{durability}"\n'
        self.bench.control.agent = Agent.of("v1", text, "0" * 64)

    def wait_for_commits(self, seconds: float) -> None:
        """From the next `restart` on."""
        commits = Commits(self.bench.parts.state, self.bench.control, seconds, seconds)
        self.bench.parts = replace(self.bench.parts, commits=commits)

    def restart(self) -> None:
        """Another daemon, in the place of this one, that has adopted nothing."""
        self.supervisor = Supervisor(common_pb2.NodeInfo(id="edge-1"), self.bench.parts, list)
        self.servicer = AttachServicer("edge-1", self.supervisor, lambda: [self._key.public_key()])

    def client(self) -> Client:
        epoch = self.bench.control.owned[ANA].epoch
        ticket = sign_ticket(Ticket(ANA, "edge-1", epoch, "v1", time.time() + 600), self._key)
        self._clients.append(Client(self.servicer, ticket))
        return self._clients[-1]

    async def begun(self, count: int) -> None:
        await eventually(lambda: len(self.agents.begun) == count, _SECONDS, f"{count} turns have begun")

    async def committed(self, version: int) -> None:
        await eventually(lambda: self.bench.control.owned[ANA].version == version, _SECONDS)

    def hold_commits(self) -> Commit:
        """What is to be stored from here on waits until it is let, or is killed."""
        commit, put = Commit(), self.bench.blobs.put

        async def held(blobs: Iterable[Blob]) -> None:
            commit.begun.set()
            await commit.let.wait()
            await put(blobs)

        self.bench.blobs.put = held  # type: ignore[method-assign]
        self._held.append(commit)
        return commit

    async def kill(self) -> None:
        """With all that runs on it. What it was about to commit is not; a new daemon is there at once."""
        for client in self._clients:
            await client.leave()
        await self.supervisor.finish_turns(0.0)
        if self.supervisor._turns:
            await asyncio.wait(self.supervisor._turns)
        for jail in list(self.bench.jails.running.values()):
            await jail.kill()
        self.bench.blobs.put = MemoryBlobs.put.__get__(self.bench.blobs)  # type: ignore[method-assign]
        self.bench.parts.reservations.release(ANA, 1)
        self.restart()

    async def close(self) -> None:
        for commit in self._held:
            commit.let.set()
        for client in self._clients:
            await client.leave()
        self.agents.let.set()
        await self.supervisor.finish_turns(_SECONDS)


@pytest.fixture
async def node(bench: Bench) -> AsyncIterator[Node]:
    node = Node(bench)
    yield node
    await node.close()


class Client:
    """One attach stream. What it does not read waits, like what fills a connection, on the node's side."""

    def __init__(self, servicer: AttachServicer, ticket: bytes) -> None:
        self.receipt = common_pb2.Receipt()
        self.error = errors_pb2.Error()
        self._requests: asyncio.Queue[attach_pb2.AttachRequest] = asyncio.Queue()
        self._requests.put_nowait(attach_pb2.AttachRequest(hello=attach_pb2.Hello(ticket=ticket)))
        self._replies: asyncio.Queue[attach_pb2.AttachReply | RoostError] = asyncio.Queue(1)
        self._stream = asyncio.create_task(self._run(servicer))

    async def _run(self, servicer: AttachServicer) -> None:
        try:
            async for reply in servicer._attach(self._sent()):
                await self._replies.put(reply)
        except RoostError as error:
            await self._replies.put(error)

    async def _sent(self) -> AsyncIterator[attach_pb2.AttachRequest]:
        while True:
            yield await self._requests.get()

    def send(self, id: str, message: str = "", **more: Any) -> None:
        turn = attach_pb2.Turn(id=id, message=message or id, **more)
        self.write(attach_pb2.AttachRequest(turn=turn))

    def cancel(self, id: str) -> None:
        self.write(attach_pb2.AttachRequest(cancel=attach_pb2.Cancel(turn_id=id)))

    def write(self, request: attach_pb2.AttachRequest) -> None:
        self._requests.put_nowait(request)

    async def read(self) -> attach_pb2.AttachReply:
        """The next reply, but for the greeting. ConnectionError if the stream was cut."""
        coming = asyncio.ensure_future(self._replies.get())
        try:
            either = {coming, self._stream}
            await asyncio.wait(either, timeout=_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not coming.done():
                coming.cancel()
        if not coming.done():
            raise ConnectionError(f"no more comes: {self._stream}")
        reply = coming.result()
        if isinstance(reply, RoostError):
            raise reply
        return await self.read() if reply.HasField("attached") else reply

    async def said(self) -> list[str]:
        """Up to the end of the turn: `~` and a delta, `(` and what it waits for; at last `=` and the reply,
        or `!` and the reason of its failure."""
        said = []
        while True:
            reply = await self.read()
            match reply.WhichOneof("kind"):
                case "delta":
                    said.append("~" + reply.delta.text)
                case "waiting":
                    said.append("(" + reply.waiting.text)
                case "committed":
                    self.receipt = reply.committed.receipt
                    return [*said, "=" + reply.committed.reply]
                case "failed":
                    self.error = reply.failed.error
                    return [*said, "!" + errors_pb2.Reason.Name(self.error.reason)]

    async def ask(self, id: str, message: str = "", **more: Any) -> str:
        """The end of the turn, as `said` has it."""
        self.send(id, message, **more)
        return (await self.said())[-1]

    async def leave(self) -> None:
        self._stream.cancel()
        await asyncio.wait({self._stream})
