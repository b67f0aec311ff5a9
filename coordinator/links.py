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

_Reply = link_pb2.ReserveReply | link_pb2.Woken | link_pb2.MoveStepReply
_Answer = _Reply | RoostError


class LinkSession:
    """A link from its registration to its end. `ended` is done when somebody here wants it to end."""

    def __init__(
        self,
        info: NodeInfo,
        revision: int,
        clock: Callable[[], float],
        gc_round: Callable[[], int] = lambda: 0,
    ) -> None:
        """`revision`: of the node's record that this registration wrote. `gc_round`: told to the node."""
        self.info = info
        self.revision = revision
        self.heard = clock()
        self.peers: tuple[str, ...] = ()
        self.load = -1.0  # not known yet
        self.rtt_ms = -1.0  # of the last reservation: there, decided, and back
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._clock = clock
        self._gc_round = gc_round
        self._outbox: asyncio.Queue[link_pb2.LinkDown] = asyncio.Queue()
        self._requests = itertools.count(1)
        self._asked: dict[int, asyncio.Future[_Answer]] = {}

    def __repr__(self) -> str:
        state = "ended" if self.ended.done() else "open"
        return f"<link of {self.info.id}, {state}, {len(self._asked)} questions asked>"

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
                    ack = link_pb2.HeartbeatAck(seq=message.heartbeat.seq, gc_round=self._gc_round())
                    self.send(link_pb2.LinkDown(ack=ack))
            case "reserved":
                self._answered(message.reserved)
            case "woken":
                self._answered(message.woken)
            case "moved":
                self._answered(message.moved)
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
        message = link_pb2.LinkDown()
        message.reserve.CopyFrom(reserve)
        sent = self._clock()
        await self._ask(message, message.reserve, timeout)
        self.rtt_ms = (self._clock() - sent) * 1000

    async def wake(self, wake: link_pb2.Wake, timeout: float) -> None:
        """Returns when the timer's turn is committed; what it failed with, or NODE_UNREACHABLE, otherwise."""
        message = link_pb2.LinkDown()
        message.wake.CopyFrom(wake)
        await self._ask(message, message.wake, timeout)

    async def move(self, step: link_pb2.MoveStep, timeout: float) -> link_pb2.MoveStepReply:
        """Returns when the node has done its part; its refusal, or NODE_UNREACHABLE, otherwise."""
        message = link_pb2.LinkDown()
        message.move.CopyFrom(step)
        answer = await self._ask(message, message.move, timeout)
        assert isinstance(answer, link_pb2.MoveStepReply)
        return answer

    async def _ask(
        self,
        message: link_pb2.LinkDown,
        request: link_pb2.Reserve | link_pb2.Wake | link_pb2.MoveStep,
        timeout: float,
    ) -> _Reply:
        if self.ended.done():
            raise self._unreachable("its link ended")
        number = request.request = next(self._requests)
        asked: asyncio.Future[_Answer] = asyncio.get_running_loop().create_future()
        self._asked[number] = asked
        self.send(message)
        try:
            async with asyncio.timeout(timeout):
                answer = await asked
        except TimeoutError:
            answer = self._unreachable(f"it did not answer within {timeout:g} s")
        finally:
            del self._asked[number]
        if isinstance(answer, RoostError):
            raise answer
        return answer

    def _answered(self, reply: _Reply) -> None:
        asked = self._asked.get(reply.request)
        if asked is not None and not asked.done():  # otherwise nobody waits any more
            asked.set_result(RoostError.from_proto(reply.error) if reply.HasField("error") else reply)

    def _unreachable(self, why: str) -> RoostError:
        return RoostError(
            Reason.NODE_UNREACHABLE, f"node {self.info.id} can't be asked: {why}", "resolve again"
        )
