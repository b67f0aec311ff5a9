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
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol, TypeVar

import grpc.aio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from edge_agent.commit_stream import CommitStream
from edge_agent.control import Agent, Commit, CommittedState
from edge_agent.tenure import Tenure
from protos.v1 import common_pb2, link_pb2, link_pb2_grpc, site_pb2
from shared import inline, rpc
from shared.effects import Call
from shared.errors import Reason, RoostError, from_rpc, translated
from shared.identity import InstanceKey
from shared.resources import Resources

log = logging.getLogger(__name__)

_WELCOME_SECONDS = 5.0
_GOODBYE_SECONDS = 1.0
_FIRST_PAUSE, _LAST_PAUSE = 0.1, 2.0

T = TypeVar("T")


def agent_from_proto(spec: common_pb2.AgentSpec) -> Agent:
    return Agent.of(spec.version, spec.policy_toml, spec.bundle_root)


class Node(Protocol):
    """What the link asks of the node."""

    def info(self) -> common_pb2.NodeInfo: ...

    def held(self) -> list[link_pb2.Held]: ...

    def heartbeat(self, seq: int) -> link_pb2.Heartbeat: ...

    def reserve(self, key: InstanceKey, epoch: int, need: Resources, hold: float) -> None:
        """NODE_FULL, NODE_SUSPENDED or NODE_STOPPING if it can't be."""
        ...

    async def resize(self, key: InstanceKey, epoch: int, need: Resources, hold: float) -> None:
        """As `reserve`, and what runs in this epoch has that size when this returns."""
        ...

    async def move(self, step: link_pb2.MoveStep) -> link_pb2.MoveStepReply:
        """This node's part in a move. Raises as `reserve`, EPOCH_STALE, MOVE_GIVEN_UP, and as a start."""
        ...

    async def evict(self, key: InstanceKey, epoch: int, why: str) -> None: ...

    async def wake(self, key: InstanceKey, epoch: int, turn_id: str, message: str, timer: str) -> None:
        """Runs a turn that a timer starts. Returns when it is committed; RoostError if it failed."""
        ...

    async def salvage(self, hashes: Sequence[str]) -> None:
        """Puts what it has copies of into the blob store."""
        ...


@dataclass(frozen=True, slots=True)
class _Session:
    coordinator: str
    address: str
    channel: grpc.aio.Channel
    stub: link_pb2_grpc.LinkAsyncStub
    commits: CommitStream
    heartbeat: float
    ttl: float
    say: Callable[[link_pb2.LinkUp], Awaitable[None]]


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
        self._left = False
        self.on_peers: Callable[[site_pb2.SitePeers], None] = lambda peers: None
        self.gc_round = 0
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
            if self._left:
                await asyncio.Event().wait()  # until cancelled
            await asyncio.sleep(pause)
            pause = min(_LAST_PAUSE, pause * 2)

    async def goodbye(self) -> None:
        """This node stops: its users need not wait for its TTL. Should nobody hear it, they wait."""
        self._left = True
        if self._session is not None:
            with suppress(TimeoutError, grpc.aio.AioRpcError, asyncio.InvalidStateError):
                async with asyncio.timeout(_GOODBYE_SECONDS):
                    await self._session.say(link_pb2.LinkUp(goodbye=link_pb2.Goodbye()))

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
        self.gc_round = welcome.gc_round  # it may be less than before, which is never wrong
        write_lock = asyncio.Lock()

        async def say(message: link_pb2.LinkUp) -> None:
            async with write_lock:
                await call.write(message)

        ttl, heartbeat = welcome.ttl_ms / 1000, welcome.heartbeat_ms / 1000
        commits = CommitStream(stub, welcome.coordinator)
        self._session = _Session(welcome.coordinator, address, channel, stub, commits, heartbeat, ttl, say)
        self._connected.set()
        log.info("linked to coordinator %s at %s", welcome.coordinator, address)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._heartbeats(node, call, write_lock, self._session), name="heartbeats")
                group.create_task(
                    self._requests(node, call, write_lock, self._session, group), name="requests"
                )
        except ExceptionGroup as errors:  # whichever noticed the end first; the other was cancelled
            raise errors.exceptions[0] from errors
        finally:
            commits.close()

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
                    self.gc_round = max(self.gc_round, down.ack.gc_round)
                case "reserve":
                    # Not awaited: memory that has to shrink first takes a while.
                    group.create_task(_reserve(node, call, write_lock, down.reserve), name="reserve")
                case "move":
                    # Not awaited: a turn may have to end first.
                    group.create_task(_move(node, call, write_lock, down.move), name="move")
                case "peers":
                    self.on_peers(down.peers)
                case "evict":
                    # Not awaited: a turn on its way out must not hold up heartbeats.
                    group.create_task(_evict(node, down.evict), name="evict")
                case "wake":
                    group.create_task(_wake(node, call, write_lock, down.wake), name="wake")
                case "salvage":
                    group.create_task(_salvage(node, down.salvage), name="salvage")
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
        size = Resources.from_proto(reply.size) if reply.HasField("size") else None
        return CommittedState(
            reply.version,
            reply.root,
            agent_from_proto(reply.agent),
            size,
            unfinished=tuple(reply.unfinished),
            inline=tuple(inline.readable(reply.inline)),
        )

    async def commit(self, key: InstanceKey, epoch: int, commit: Commit, timeout: float) -> None:
        beside = commit.beside
        request = link_pb2.CommitRequest(
            node=self._node_id,
            key=key.to_proto(),
            epoch=epoch,
            version=commit.version,
            root=commit.root,
            turn_id=commit.turn_id,
            state_bytes=commit.state_bytes,
            calls=beside.calls,
            timers=[setting.to_proto() for setting in beside.timers],
            cancel=beside.cancelled,
            timer=beside.timer,
            inline=inline.to_protos(commit.inline),
            gc_round=commit.gc_round,
        )
        deadline = time.monotonic() + timeout
        session = await self._wait_for_session(timeout)
        await session.commits.ask(request, max(0.01, deadline - time.monotonic()))

    async def journal(
        self, key: InstanceKey, epoch: int, turn_id: str, write: Sequence[Call], timeout: float
    ) -> Sequence[Call]:
        request = link_pb2.JournalRequest(
            node=self._node_id,
            key=key.to_proto(),
            epoch=epoch,
            turn_id=turn_id,
            write=[call.to_proto() for call in write],
        )
        reply = await self._ask(lambda stub, left: stub.Journal(request, timeout=left), timeout)
        return [Call.from_proto(call) for call in reply.calls]

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


async def _reserve(node: Node, call: _Call, write_lock: asyncio.Lock, request: link_pb2.Reserve) -> None:
    reply = link_pb2.ReserveReply(request=request.request)
    try:
        key, hold = InstanceKey.from_proto(request.key), request.hold_ms / 1000
        size = Resources.from_proto(request.size) if request.HasField("size") else None
        need = agent_from_proto(request.agent).policy.need.sized(size)
        if request.resize:
            await node.resize(key, request.epoch, need, hold)
        else:
            node.reserve(key, request.epoch, need, hold)
    except RoostError as error:
        reply.error.CopyFrom(error.to_proto())
    async with write_lock:
        await call.write(link_pb2.LinkUp(reserved=reply))


async def _wake(node: Node, call: _Call, write_lock: asyncio.Lock, wake: link_pb2.Wake) -> None:
    """If the link ends meanwhile, nobody is told; the turn goes on."""
    reply = link_pb2.Woken(request=wake.request)
    try:
        key, timer = InstanceKey.from_proto(wake.key), wake.timer
        await node.wake(key, wake.epoch, timer.turn_id, timer.message, timer.name)
    except RoostError as error:
        reply.error.CopyFrom(error.to_proto())
    except Exception as error:
        log.exception("a timer's turn failed by a bug")
        reply.error.CopyFrom(RoostError(Reason.INTERNAL, f"the node failed: {error!r}").to_proto())
    async with write_lock:
        await call.write(link_pb2.LinkUp(woken=reply))


async def _move(node: Node, call: _Call, write_lock: asyncio.Lock, step: link_pb2.MoveStep) -> None:
    try:
        reply = await node.move(step)
    except RoostError as error:
        reply = link_pb2.MoveStepReply(error=error.to_proto())
    except Exception:
        log.exception("a bug in a move")
        bug = RoostError(Reason.INTERNAL, "the node failed at its part of a move; its log says how")
        reply = link_pb2.MoveStepReply(error=bug.to_proto())
    reply.request = step.request
    async with write_lock:
        await call.write(link_pb2.LinkUp(moved=reply))


async def _evict(node: Node, evict: link_pb2.Evict) -> None:
    """What can't be done now is asked for again at the next welcome; until then the epoch fences it."""
    try:
        await node.evict(InstanceKey.from_proto(evict.key), evict.epoch, evict.why)
    except Exception:
        log.exception("an eviction failed")


async def _salvage(node: Node, salvage: link_pb2.Salvage) -> None:
    """What fails is asked for again by whoever misses it."""
    try:
        await node.salvage(salvage.hashes)
    except RoostError as error:
        log.warning("copies of blobs were asked for, and could not be put: %s", error.message)
    except Exception:
        log.exception("a salvage failed")


def _unreachable(address: str, what: str) -> RoostError:
    return RoostError(Reason.COORDINATOR_UNREACHABLE, f"coordinator {address} {what}")
