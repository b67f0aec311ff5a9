"""A node as far as a coordinator can tell: a real link over real gRPC, and nothing behind it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc.aio

from protos.v1 import common_pb2, link_pb2, link_pb2_grpc
from shared import rpc
from shared.errors import Reason, RoostError, from_rpc
from shared.resources import Resources

ROOMY = Resources(64 << 30, 1_000_000, 1_000_000)


@dataclass
class FakeNode:
    """Registers with one of `coordinators` after another, answers reservations, keeps what it was told."""

    id: str
    coordinators: Sequence[str]
    role: common_pb2.Role = common_pb2.EDGE
    capacity: Resources = ROOMY
    position: tuple[float, float] | None = None
    started_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    held: list[link_pb2.Held] = field(default_factory=list)
    refusal: RoostError | None = None  # to every reservation
    mute: bool = False  # reservations get no answer
    silent: bool = False  # the link stays open, but no heartbeat is sent
    welcome: link_pb2.Welcome | None = None  # of the present link
    welcomes: int = 0
    acknowledged: int = 0
    reserves: list[link_pb2.Reserve] = field(default_factory=list)
    evicted: list[link_pb2.Evict] = field(default_factory=list)
    ends: list[RoostError] = field(default_factory=list)  # how earlier links ended
    stub: link_pb2_grpc.LinkAsyncStub | None = None
    _writing: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def address(self) -> str:
        return f"{self.id}.test:1"

    def info(self) -> common_pb2.NodeInfo:
        info = common_pb2.NodeInfo(
            id=self.id,
            role=self.role,
            site="lab",
            address=self.address,
            capacity=self.capacity.to_proto(),
            api_version="v1",
            started_id=self.started_id,
        )
        if self.position is not None:
            info.position.latitude, info.position.longitude = self.position
        return info

    async def run(self) -> None:
        """Until cancelled; registers anew whenever its link ends."""
        for address in itertools.cycle(self.coordinators):
            async with rpc.channel(address) as channel:
                self.stub = link_pb2_grpc.LinkStub(channel)
                try:
                    await self._one_link(self.stub)
                except grpc.aio.AioRpcError as error:
                    self.ends.append(from_rpc(error, Reason.COORDINATOR_UNREACHABLE, address))
                finally:
                    self.welcome = None
            await asyncio.sleep(0.05)

    async def _one_link(self, stub: link_pb2_grpc.LinkAsyncStub) -> None:
        call = stub.Open()  # type: ignore[call-arg]
        register = link_pb2.Register(node=self.info(), instances=self.held)
        await call.write(link_pb2.LinkUp(register=register))
        beating: asyncio.Task[None] | None = None
        try:
            async for down in call:
                match down.WhichOneof("kind"):
                    case "welcome":
                        self.welcome = down.welcome
                        self.welcomes += 1
                        self.evicted += down.welcome.evict
                        beating = asyncio.create_task(self._beat(call, down.welcome.heartbeat_ms / 1000))
                    case "ack":
                        self.acknowledged = down.ack.seq
                    case "evict":
                        self.evicted.append(down.evict)
                    case "reserve":
                        self.reserves.append(down.reserve)
                        if not self.mute:
                            await self._send(call, link_pb2.LinkUp(reserved=self._reserved(down.reserve)))
        finally:
            if beating is not None:
                beating.cancel()
            call.cancel()

    async def _send(self, call: grpc.aio.StreamStreamCall, message: link_pb2.LinkUp) -> None:
        async with self._writing:  # gRPC allows one write at a time
            with contextlib.suppress(asyncio.InvalidStateError):  # the link has ended: reading says why
                await call.write(message)

    def _reserved(self, reserve: link_pb2.Reserve) -> link_pb2.ReserveReply:
        error = self.refusal.to_proto() if self.refusal else None
        return link_pb2.ReserveReply(request=reserve.request, error=error)

    async def _beat(self, call: grpc.aio.StreamStreamCall, every: float) -> None:
        for seq in itertools.count(1):
            if not self.silent:
                heartbeat = link_pb2.Heartbeat(seq=seq, peers=["other"], load=0.5)
                await self._send(call, link_pb2.LinkUp(heartbeat=heartbeat))
            await asyncio.sleep(every)

    # --- what a node asks --------------------------------------------------------------------

    async def fetch(self, key: common_pb2.InstanceKey, epoch: int) -> link_pb2.FetchReply:
        return await self._ask("Fetch", link_pb2.FetchRequest(node=self.id, key=key, epoch=epoch))

    async def commit(self, key: common_pb2.InstanceKey, epoch: int, version: int, turn: str = "") -> None:
        request = link_pb2.CommitRequest(
            node=self.id,
            key=key,
            epoch=epoch,
            version=version,
            root=f"root-{version}",
            turn_id=turn or f"t{version}",
        )
        await self._ask("Commit", request)

    async def hibernated(self, key: common_pb2.InstanceKey, epoch: int) -> None:
        await self._ask("Hibernated", link_pb2.HibernatedRequest(node=self.id, key=key, epoch=epoch))

    async def _ask(self, method: str, request: object) -> object:
        assert self.stub is not None
        try:
            return await getattr(self.stub, method)(request, timeout=5.0)
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error, Reason.COORDINATOR_UNREACHABLE, "the coordinator") from error
        except (grpc.aio.UsageError, asyncio.CancelledError) as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # The link ended just now, and its channel with it.
            raise RoostError(Reason.COORDINATOR_UNREACHABLE, "the link ended") from error


@asynccontextmanager
async def running_node(node: FakeNode) -> AsyncIterator[FakeNode]:
    """The node's link, kept up for as long as the block lasts. Returns before it is registered."""
    task = asyncio.create_task(node.run(), name=f"fake {node.id}")
    try:
        yield node
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
