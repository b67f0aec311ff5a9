"""One node's open link: what it last said, and what is still asked of it."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable

from coordinator.records import NodeInfo
from protos.v1 import link_pb2
from shared.errors import Reason, RoostError
from shared.identity import InstanceKey

_UNREAD = 4096  # messages that a node may leave unread before its link is given up


class LinkSession:
    """A link from its registration to its end. `ended` is done when somebody here wants it to end."""

    def __init__(self, info: NodeInfo, revision: int, clock: Callable[[], float]) -> None:
        """`revision`: of the node's record that this registration wrote."""
        self.info = info
        self.revision = revision
        self.heard = clock()
        self.peers: tuple[str, ...] = ()
        self.load = -1.0  # not known yet
        self.rtt_ms = -1.0  # of the last reservation: there, decided, and back
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._clock = clock
        self._outbox: asyncio.Queue[link_pb2.LinkDown] = asyncio.Queue()
        self._requests = itertools.count(1)
        self._asked: dict[int, asyncio.Future[RoostError | None]] = {}

    def __repr__(self) -> str:
        state = "ended" if self.ended.done() else "open"
        return f"<link of {self.info.id}, {state}, {len(self._asked)} reservations asked>"

    @property
    def silence(self) -> float:
        """Seconds since the node was last heard."""
        return self._clock() - self.heard

    def end(self, error: RoostError) -> None:
        """Ends the stream with `error`; who waits for the node's answers gets NODE_UNREACHABLE."""
        if not self.ended.done():
            self.ended.set_exception(error)
        self.forget()

    def forget(self) -> None:
        """The stream is over, however it came to that."""
        for asked in self._asked.values():
            if not asked.done():
                asked.set_result(self._unreachable("its link ended"))

    def hear(self, message: link_pb2.LinkUp, acknowledge: bool) -> None:
        """Takes one message of the node. Without `acknowledge`, heartbeats get no answer."""
        self.heard = self._clock()
        match message.WhichOneof("kind"):
            case "heartbeat":
                self.peers = tuple(message.heartbeat.peers)
                self.load = message.heartbeat.load
                if acknowledge:
                    self.send(link_pb2.LinkDown(ack=link_pb2.HeartbeatAck(seq=message.heartbeat.seq)))
            case "reserved":
                self._answered(message.reserved)
            case _:
                raise RoostError(
                    Reason.BAD_REQUEST,
                    f"{self.info.id} sent what only starts a link, or nothing",
                    "is it an older or newer version?",
                )

    def send(self, message: link_pb2.LinkDown) -> None:
        if self._outbox.qsize() >= _UNREAD:
            self.end(self._unreachable("it does not read what is sent to it"))
        else:
            self._outbox.put_nowait(message)

    async def next_to_send(self) -> link_pb2.LinkDown:
        return await self._outbox.get()

    def evict(self, key: InstanceKey, epoch: int, why: str) -> None:
        self.send(link_pb2.LinkDown(evict=link_pb2.Evict(key=key.to_proto(), epoch=epoch, why=why)))

    async def reserve(self, reserve: link_pb2.Reserve, timeout: float) -> None:
        """Returns if the node keeps room for it; its refusal, or NODE_UNREACHABLE, otherwise."""
        if self.ended.done():
            raise self._unreachable("its link ended")
        number = next(self._requests)
        asked = asyncio.get_running_loop().create_future()
        self._asked[number] = asked
        message = link_pb2.LinkDown()
        message.reserve.CopyFrom(reserve)
        message.reserve.request = number
        sent = self._clock()
        self.send(message)
        try:
            async with asyncio.timeout(timeout):
                refusal = await asked
        except TimeoutError:
            refusal = self._unreachable(f"it did not answer within {timeout:g} s")
        finally:
            del self._asked[number]
        if refusal is not None:
            raise refusal
        self.rtt_ms = (self._clock() - sent) * 1000

    def _answered(self, reply: link_pb2.ReserveReply) -> None:
        asked = self._asked.get(reply.request)
        if asked is not None and not asked.done():  # otherwise nobody waits any more
            asked.set_result(RoostError.from_proto(reply.error) if reply.HasField("error") else None)

    def _unreachable(self, why: str) -> RoostError:
        return RoostError(
            Reason.NODE_UNREACHABLE, f"node {self.info.id} can't be asked: {why}", "resolve again"
        )
