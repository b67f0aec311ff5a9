"""A coordinator and nodes for tests of what users run: real gRPC, scripted answers, nothing behind them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import grpc.aio

from protos.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    attach_pb2,
    attach_pb2_grpc,
    blobs_pb2,
    blobs_pb2_grpc,
    common_pb2,
    resolver_pb2,
    resolver_pb2_grpc,
)
from shared import rpc
from shared.errors import Reason, RoostError
from tests.support.eventually import eventually

Replies = AsyncIterator[attach_pb2.AttachReply]
Answer = Callable[["FakeNode", attach_pb2.Turn], Replies]


def delta(turn: attach_pb2.Turn, text: str) -> attach_pb2.AttachReply:
    return attach_pb2.AttachReply(delta=attach_pb2.Delta(turn_id=turn.id, text=text))


async def echo(node: FakeNode, turn: attach_pb2.Turn) -> Replies:
    """Two deltas, then the reply: the message in capitals."""
    text = turn.message.upper()
    yield delta(turn, text[:2])
    yield delta(turn, text[2:])
    receipt = common_pb2.Receipt(
        node=node.name,
        epoch=node.epoch,
        version=len(node.turns),
        resumed_from=common_pb2.NEW if len(node.turns) == 1 else common_pb2.LIVE,
        resumed_version=len(node.turns) - 1,
        durable=True,
    )
    yield attach_pb2.AttachReply(committed=attach_pb2.Committed(turn_id=turn.id, reply=text, receipt=receipt))


def failing(error: RoostError) -> Answer:
    """The turn fails; the stream goes on."""

    async def answer(node: FakeNode, turn: attach_pb2.Turn) -> Replies:
        yield attach_pb2.AttachReply(failed=attach_pb2.TurnFailed(turn_id=turn.id, error=error.to_proto()))

    return answer


async def dying(node: FakeNode, turn: attach_pb2.Turn) -> Replies:
    """The node dies in the middle of a reply."""
    yield delta(turn, "half a rep")
    node.kill()
    await asyncio.Event().wait()  # until the server cancels it


async def cancellable(node: FakeNode, turn: attach_pb2.Turn) -> Replies:
    """A delta, and no more until it is cancelled."""
    yield delta(turn, "so far")
    await eventually(lambda: turn.id in node.cancels, 30.0, "the turn is cancelled")
    error = RoostError(Reason.TURN_CANCELLED, "the turn was cancelled", "")
    yield attach_pb2.AttachReply(failed=attach_pb2.TurnFailed(turn_id=turn.id, error=error.to_proto()))


async def silent(node: FakeNode, turn: attach_pb2.Turn) -> Replies:
    """The node never answers."""
    await node.stopped.wait()
    for nothing in ():
        yield nothing


class FakeNode(attach_pb2_grpc.AttachServicer):
    """Answers each turn by the next of `script`, or else by echoing it."""

    def __init__(self, name: str, *script: Answer) -> None:
        self.name = name
        self.epoch = 1
        self.script = deque(script)
        self.refusals: deque[RoostError] = deque()  # of the next hellos
        self.tickets: list[bytes] = []
        self.turns: list[tuple[str, str]] = []
        self.sent: list[attach_pb2.Turn] = []  # the same, whole
        self.cancels: list[str] = []
        self.stopped = asyncio.Event()
        self.address = ""
        self._server = rpc.server()
        self._end: asyncio.Task[None] | None = None

    async def start(self, listen: str = "127.0.0.1:0") -> None:
        attach_pb2_grpc.add_AttachServicer_to_server(self, self._server)
        self.address = rpc.bind(self._server, listen)
        await self._server.start()

    def kill(self) -> None:
        self.stopped.set()
        self._end = self._end or asyncio.create_task(self._server.stop(None))

    async def stop(self) -> None:
        self.kill()
        assert self._end is not None
        await self._end

    async def Attach(  # type: ignore[override]
        self,
        requests: AsyncIterator[attach_pb2.AttachRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> Replies:
        async for request in self._turns(requests):
            if request.HasField("hello"):
                self.tickets.append(request.hello.ticket)
                if self.refusals:
                    await self.refusals.popleft().abort(context)
                yield attach_pb2.AttachReply(attached=attach_pb2.Attached(node=self.name, epoch=self.epoch))
                continue
            self.turns.append((request.turn.id, request.turn.message))
            self.sent.append(request.turn)
            answer = self.script.popleft() if self.script else echo
            async for reply in answer(self, request.turn):
                yield reply

    async def _turns(
        self, requests: AsyncIterator[attach_pb2.AttachRequest]
    ) -> AsyncIterator[attach_pb2.AttachRequest]:
        """All but cancellations, which are read as they come."""
        arrived: asyncio.Queue[attach_pb2.AttachRequest | None] = asyncio.Queue()

        async def read() -> None:
            async for request in requests:
                if request.HasField("cancel"):
                    self.cancels.append(request.cancel.turn_id)
                else:
                    arrived.put_nowait(request)
            arrived.put_nowait(None)

        reading = asyncio.create_task(read())
        try:
            while (request := await arrived.get()) is not None:
                yield request
        finally:
            reading.cancel()


class FakeCoordinator(
    resolver_pb2_grpc.ResolverServicer, admin_pb2_grpc.AdminServicer, blobs_pb2_grpc.BlobsServicer
):
    """Refuses with each of `refusals`, then names the first of `nodes` that is not excluded; if all are, the
    first, as for an instance that may not be moved."""

    def __init__(self, *nodes: FakeNode) -> None:
        self.nodes = list(nodes)
        self.refusals: deque[RoostError] = deque()
        self.resolved: list[resolver_pb2.ResolveRequest] = []
        self.status = admin_pb2.StatusReply(coordinator="c1")
        self.deployed: list[common_pb2.AgentSpec] = []
        self.drained: list[tuple[str, bool]] = []
        self.drains: deque[admin_pb2.DrainReply] = deque()
        self.moved: list[admin_pb2.MoveRequest] = []
        self.resized: list[admin_pb2.ResizeRequest] = []
        self.blobs: dict[str, bytes] = {}
        self.address = ""
        self._server = rpc.server()

    async def start(self, listen: str = "127.0.0.1:0") -> None:
        resolver_pb2_grpc.add_ResolverServicer_to_server(self, self._server)
        admin_pb2_grpc.add_AdminServicer_to_server(self, self._server)
        blobs_pb2_grpc.add_BlobsServicer_to_server(self, self._server)
        self.address = rpc.bind(self._server, listen)
        await self._server.start()

    async def stop(self) -> None:
        await self._server.stop(None)

    async def Resolve(  # type: ignore[override]
        self, request: resolver_pb2.ResolveRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> resolver_pb2.ResolveReply:
        self.resolved.append(request)
        if self.refusals:
            await self.refusals.popleft().abort(context)
        free = [node for node in self.nodes if node.name not in request.exclude]
        node = (free or self.nodes)[0]
        return resolver_pb2.ResolveReply(
            node=node.name,
            address=node.address,
            epoch=node.epoch,
            ticket=f"ticket {len(self.resolved)}".encode(),
            why="the nearest with room",
        )

    async def Status(self, request: Any, context: Any) -> admin_pb2.StatusReply:  # type: ignore[override]
        return self.status

    async def Deploy(  # type: ignore[override]
        self, request: admin_pb2.DeployRequest, context: Any
    ) -> admin_pb2.DeployReply:
        changed = request.agent not in self.deployed
        self.deployed.append(request.agent)
        return admin_pb2.DeployReply(version="v" + request.agent.bundle_root[:8], changed=changed)

    async def ListAgents(self, request: Any, context: Any) -> Any:
        agents = [common_pb2.AgentSpec(name=a.name, policy_toml=a.policy_toml) for a in self.deployed]
        for agent, spec in zip(agents, self.deployed, strict=True):
            agent.bundle_root, agent.version = spec.bundle_root, spec.bundle_root
        return admin_pb2.ListAgentsReply(agents=agents)

    async def Drain(  # type: ignore[override]
        self, request: admin_pb2.DrainRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> admin_pb2.DrainReply:
        if self.refusals:
            await self.refusals.popleft().abort(context)
        self.drained.append((request.node, request.undo))
        return self.drains.popleft() if self.drains else admin_pb2.DrainReply(instances=2)

    async def Resize(  # type: ignore[override]
        self, request: admin_pb2.ResizeRequest, context: Any
    ) -> admin_pb2.ResizeReply:
        self.resized.append(request)
        size = common_pb2.Resources(
            memory_bytes=request.size.memory_bytes or 1, cpu_millis=request.size.cpu_millis or 1, pids=9
        )
        return admin_pb2.ResizeReply(size=size, node="north", running=True)

    async def Move(  # type: ignore[override]
        self, request: admin_pb2.MoveRequest, context: Any
    ) -> AsyncIterator[admin_pb2.MoveProgress]:
        self.moved.append(request)
        if self.refusals:
            await self.refusals.popleft().abort(context)
        yield admin_pb2.MoveProgress(doing="south prepares")
        moved = admin_pb2.Moved(
            source="north", target=request.node or "south", epoch=2, version=1, live=True, pause_ms=12.3
        )
        yield admin_pb2.MoveProgress(moved=moved)

    async def Missing(  # type: ignore[override]
        self, request: blobs_pb2.MissingRequest, context: Any
    ) -> blobs_pb2.MissingReply:
        return blobs_pb2.MissingReply(hashes=[h for h in request.hashes if h not in self.blobs])

    async def Put(  # type: ignore[override]
        self, requests: AsyncIterator[blobs_pb2.Blob], context: Any
    ) -> blobs_pb2.PutReply:
        stored = 0
        async for blob in requests:
            self.blobs[blob.hash] = blob.zstd
            stored += 1
        return blobs_pb2.PutReply(stored=stored)

    async def Get(self, request: Any, context: Any) -> AsyncIterator[blobs_pb2.Blob]:
        for hash in request.hashes:
            yield blobs_pb2.Blob(hash=hash, zstd=self.blobs[hash])


class FakeMesh:
    """Starts what is added, and stops it at the end."""

    def __init__(self) -> None:
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> FakeMesh:
        return self

    async def __aexit__(self, *exc: Any) -> None:
        await self._stack.aclose()

    async def add(self, *parts: FakeNode | FakeCoordinator, listen: str = "127.0.0.1:0") -> None:
        for part in parts:
            await part.start(listen)
            self._stack.push_async_callback(part.stop)
