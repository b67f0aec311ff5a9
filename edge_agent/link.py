"""The node's line to the control plane: one stream to one coordinator, opened anew whenever it breaks.

Always true: tenure is counted from the moment before a registration or heartbeat was sent; evictions that
come with a welcome are carried out before the node trusts itself again.

How it can fail: the coordinator dies or is cut off (the next one in the list is tried), answers slowly
(each call has a deadline), or is silent though connected (no acknowledgement for a TTL ends the session).
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import grpc.aio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from edge_agent.control import Agent, CommittedState
from edge_agent.tenure import Tenure
from protos.v1 import common_pb2, link_pb2, link_pb2_grpc
from shared import rpc
from shared.errors import Reason, RoostError, from_rpc, translated
from shared.identity import InstanceKey

log = logging.getLogger(__name__)

_WELCOME_SECONDS = 5.0
_FIRST_PAUSE, _LAST_PAUSE = 0.1, 2.0

T = TypeVar("T")


def agent_from_proto(spec: common_pb2.AgentSpec) -> Agent:
    return Agent.of(spec.version, spec.policy_toml, spec.bundle_root)


class Node(Protocol):
    """What the link asks of the node."""

    def info(self) -> common_pb2.NodeInfo: ...

    def held(self) -> list[link_pb2.Held]: ...

    def heartbeat(self, seq: int) -> link_pb2.Heartbeat: ...

    def reserve(self, key: InstanceKey, epoch: int, agent: Agent, hold: float) -> None:
        """NODE_FULL, NODE_SUSPENDED or NODE_STOPPING if it can't be."""
        ...

    async def evict(self, key: InstanceKey, epoch: int, why: str) -> None: ...


@dataclass(frozen=True, slots=True)
class _Session:
    coordinator: str
    address: str
    channel: grpc.aio.Channel
    stub: link_pb2_grpc.LinkAsyncStub
    heartbeat: float
    ttl: float


_Call = grpc.aio.StreamStreamCall[link_pb2.LinkUp, link_pb2.LinkDown]


class Link:
    """Implements ControlPlane for the node while a session lasts."""

    def __init__(self, node_id: str, coordinators: Sequence[str], tenure: Tenure) -> None:
        self._node_id = node_id
        self._coordinators = coordinators
        self._tenure = tenure
        self._session: _Session | None = None
        self._seq = itertools.count(1)
        self._connected = asyncio.Event()
        self.ticket_keys: list[Ed25519PublicKey] = []

    @property
    def coordinator(self) -> str:
        """The id of the coordinator that holds the link now, or an empty string."""
        return self._session.coordinator if self._session else ""

    async def channel(self, timeout: float) -> grpc.aio.Channel:
        """The session's channel, for other services of the coordinator."""
        return (await self._wait_for_session(timeout)).channel

    async def run(self, node: Node) -> None:
        """Until cancelled: one session after another, with each coordinator in turn."""
        pause = _FIRST_PAUSE
        for address in itertools.cycle(self._coordinators):
            begun = time.monotonic()
            try:
                await self._hold_session(node, address)
            except RoostError as error:
                log.warning("link to %s: %s", address, error.message)
            if time.monotonic() - begun > _LAST_PAUSE:
                pause = _FIRST_PAUSE
            await asyncio.sleep(pause)
            pause = min(_LAST_PAUSE, pause * 2)

    # --- one session -------------------------------------------------------------------------

    async def _hold_session(self, node: Node, address: str) -> None:
        """Returns or raises RoostError when the session is over."""
        async with rpc.channel(address) as channel:
            stub = link_pb2_grpc.LinkStub(channel)
            call = stub.Open()  # type: ignore[call-arg]  # messages are written one by one
            try:
                await self._talk(node, call, channel, stub, address)
            except grpc.aio.AioRpcError as error:
                raise from_rpc(error, Reason.COORDINATOR_UNREACHABLE, f"coordinator {address}") from error
            except asyncio.InvalidStateError as error:
                raise _unreachable(address, "ended the link") from error
            finally:
                self._session = None
                self._connected.clear()
                call.cancel()

    async def _talk(
        self,
        node: Node,
        call: _Call,
        channel: grpc.aio.Channel,
        stub: link_pb2_grpc.LinkAsyncStub,
        address: str,
    ) -> None:
        sent_at = time.monotonic()
        try:
            async with asyncio.timeout(_WELCOME_SECONDS):
                register = link_pb2.Register(node=node.info(), instances=node.held())
                await call.write(link_pb2.LinkUp(register=register))
                first = await self._read(call)
        except TimeoutError as error:
            raise _unreachable(address, f"gave no welcome within {_WELCOME_SECONDS:g} s") from error
        if not first.HasField("welcome"):
            raise RoostError(Reason.INTERNAL, f"coordinator {address} did not begin with a welcome")
        welcome = first.welcome
        await asyncio.gather(*(_evict(node, evict) for evict in welcome.evict))
        self.ticket_keys = [Ed25519PublicKey.from_public_bytes(k) for k in welcome.ticket_keys]
        self._tenure.welcomed(sent_at, welcome.ttl_ms / 1000)
        self._session = _Session(
            welcome.coordinator, address, channel, stub, welcome.heartbeat_ms / 1000, welcome.ttl_ms / 1000
        )
        self._connected.set()
        log.info("linked to coordinator %s at %s", welcome.coordinator, address)
        write_lock = asyncio.Lock()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._heartbeats(node, call, write_lock, self._session), name="heartbeats")
                group.create_task(
                    self._requests(node, call, write_lock, self._session, group), name="requests"
                )
        except ExceptionGroup as errors:  # whichever noticed the end first; the other was cancelled
            raise errors.exceptions[0] from errors

    async def _heartbeats(self, node: Node, call: _Call, write_lock: asyncio.Lock, session: _Session) -> None:
        while True:
            seq = next(self._seq)
            self._tenure.sent(seq, time.monotonic())
            async with write_lock:
                await call.write(link_pb2.LinkUp(heartbeat=node.heartbeat(seq)))
            await asyncio.sleep(session.heartbeat)

    async def _requests(
        self, node: Node, call: _Call, write_lock: asyncio.Lock, session: _Session, group: asyncio.TaskGroup
    ) -> None:
        while True:
            try:
                async with asyncio.timeout(session.ttl):
                    down = await self._read(call)
            except TimeoutError as error:
                raise _unreachable(session.address, f"was silent for {session.ttl:g} s") from error
            match down.WhichOneof("kind"):
                case "ack":
                    self._tenure.acknowledged(down.ack.seq)
                case "reserve":
                    reply = _reserve(node, down.reserve)
                    async with write_lock:
                        await call.write(link_pb2.LinkUp(reserved=reply))
                case "evict":
                    # Not awaited: a turn on its way out must not hold up heartbeats.
                    group.create_task(_evict(node, down.evict), name="evict")
                case _:
                    log.warning("coordinator %s sent something unknown; is it newer?", session.coordinator)

    async def _read(self, call: _Call) -> link_pb2.LinkDown:
        down = await call.read()
        if isinstance(down, link_pb2.LinkDown):
            return down
        raise RoostError(Reason.COORDINATOR_UNREACHABLE, "the coordinator ended the link")

    # --- ControlPlane ------------------------------------------------------------------------

    async def fetch(self, key: InstanceKey, epoch: int, timeout: float) -> CommittedState:
        request = link_pb2.FetchRequest(node=self._node_id, key=key.to_proto(), epoch=epoch)
        reply = await self._ask(lambda stub, left: stub.Fetch(request, timeout=left), timeout)
        return CommittedState(reply.version, reply.root, agent_from_proto(reply.agent))

    async def commit(
        self, key: InstanceKey, epoch: int, version: int, root: str, turn_id: str, timeout: float
    ) -> None:
        request = link_pb2.CommitRequest(
            node=self._node_id,
            key=key.to_proto(),
            epoch=epoch,
            version=version,
            root=root,
            turn_id=turn_id,
        )
        await self._ask(lambda stub, left: stub.Commit(request, timeout=left), timeout)

    async def hibernated(self, key: InstanceKey, epoch: int, timeout: float) -> None:
        request = link_pb2.HibernatedRequest(node=self._node_id, key=key.to_proto(), epoch=epoch)
        await self._ask(lambda stub, left: stub.Hibernated(request, timeout=left), timeout)

    async def _ask(
        self, call: Callable[[link_pb2_grpc.LinkAsyncStub, float], Awaitable[T]], timeout: float
    ) -> T:
        deadline = time.monotonic() + timeout
        session = await self._wait_for_session(timeout)
        with translated(Reason.COORDINATOR_UNREACHABLE, f"coordinator {session.coordinator}"):
            return await call(session.stub, max(0.01, deadline - time.monotonic()))

    async def _wait_for_session(self, timeout: float) -> _Session:
        try:
            async with asyncio.timeout(timeout):
                while self._session is None:
                    await self._connected.wait()
                return self._session
        except TimeoutError as error:
            raise RoostError(
                Reason.COORDINATOR_UNREACHABLE,
                "this node has no link to a coordinator",
                f"is one of {', '.join(self._coordinators)} running, and can this node reach it?",
            ) from error


def _reserve(node: Node, request: link_pb2.Reserve) -> link_pb2.ReserveReply:
    try:
        key = InstanceKey.from_proto(request.key)
        node.reserve(key, request.epoch, agent_from_proto(request.agent), request.hold_ms / 1000)
    except RoostError as error:
        return link_pb2.ReserveReply(request=request.request, error=error.to_proto())
    return link_pb2.ReserveReply(request=request.request)


async def _evict(node: Node, evict: link_pb2.Evict) -> None:
    """What can't be done now is asked for again at the next welcome; until then the epoch fences it."""
    try:
        await node.evict(InstanceKey.from_proto(evict.key), evict.epoch, evict.why)
    except Exception:
        log.exception("an eviction failed")


def _unreachable(address: str, what: str) -> RoostError:
    return RoostError(Reason.COORDINATOR_UNREACHABLE, f"coordinator {address} {what}")
