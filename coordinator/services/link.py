"""Link: for nodes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from coordinator.inline import InlineCommits
from coordinator.journal import Journals, ending
from coordinator.links import LinkSession
from coordinator.ownership import Extra, Ownership, Uploaded
from coordinator.registry import Registry, Timing
from coordinator.resolving import Resolving
from coordinator.services.commit_stream import serve_commits
from coordinator.tickets import Tickets
from coordinator.timers import Changes, Timers
from protos.v1 import link_pb2, link_pb2_grpc
from shared import inline
from shared.effects import MAX_CALLS, Call
from shared.errors import Reason, RoostError
from shared.failpoints import failpoint
from shared.identity import InstanceKey
from shared.manifest import MAX_FILE
from shared.names import NAME_RULE, is_name
from shared.timers import Setting

_FIRST_MESSAGE_TIMEOUT = 5.0  # seconds
_NODE_FAULT = "this is a fault of the node: is it an older or newer version?"
_LONGEST_NAME = 256  # characters of a root or of a turn's id


class LinkServicer(link_pb2_grpc.LinkServicer):
    def __init__(
        self,
        registry: Registry,
        ownership: Ownership,
        resolving: Resolving,
        tickets: Tickets,
        timing: Timing,
        journals: Journals,
        timers: Timers,
        inline_commits: InlineCommits,
    ) -> None:
        self._registry = registry
        self._ownership = ownership
        self._resolving = resolving
        self._tickets = tickets
        self._timing = timing
        self._journals = journals
        self._timers = timers
        self._inline = inline_commits

    async def Open(  # type: ignore[override]  # grpc.aio's other way to stream: it writes to the context
        self, request_iterator: AsyncIterator[link_pb2.LinkUp], context: Any
    ) -> None:
        session, evictions = await self._registry.register(await _registration(request_iterator))
        try:
            await context.write(link_pb2.LinkDown(welcome=self._welcome(evictions)))
            await self._serve(session, request_iterator, context)
        finally:
            self._registry.closed(session)

    async def Fetch(self, request: link_pb2.FetchRequest, context: Any) -> link_pb2.FetchReply:
        node, key = _node(request.node), InstanceKey.from_proto(request.key)
        agent = await self._resolving.agent(key)
        woken, unfinished = await asyncio.gather(
            self._ownership.wake(key, node, request.epoch, agent.version),
            self._journals.forget_old(node, key, request.epoch),
        )
        record = woken.value
        failpoint("coordinator.fetch.before_answer")
        return link_pb2.FetchReply(
            version=record.version,
            root=record.root,
            agent=agent.to_proto(),
            size=record.size.to_proto() if record.size else None,
            unfinished=unfinished,
            inline=await self._inline.of(key),  # after the record was read
        )

    async def Journal(self, request: link_pb2.JournalRequest, context: Any) -> link_pb2.JournalReply:
        node, key = _node(request.node), InstanceKey.from_proto(request.key)
        _check_length("turn_id", request.turn_id)
        calls: Sequence[Call] = [Call.from_proto(call) for call in request.write]
        if len({call.number for call in calls}) < len(calls):
            raise RoostError(Reason.BAD_REQUEST, "a call is written once at a time", _NODE_FAULT)
        if calls:
            calls = await self._journals.write(node, key, request.epoch, request.turn_id, calls)
        else:
            calls = await self._journals.read(node, key, request.epoch, request.turn_id)
        return link_pb2.JournalReply(calls=[call.to_proto() for call in calls])

    async def Commit(self, request: link_pb2.CommitRequest, context: Any) -> link_pb2.CommitReply:
        node, key = _node(request.node), InstanceKey.from_proto(request.key)
        _check_length("root", request.root)
        _check_length("turn_id", request.turn_id)
        if request.version < 1:
            raise RoostError(Reason.BAD_REQUEST, "a commit's version must be 1 or more", _NODE_FAULT)
        if request.state_bytes > MAX_FILE:
            raise RoostError(Reason.BAD_REQUEST, "a commit's state_bytes are out of range", _NODE_FAULT)
        if request.calls > MAX_CALLS:
            raise RoostError(Reason.BAD_REQUEST, f"a turn has at most {MAX_CALLS} calls", _NODE_FAULT)
        changes = Changes(
            request.turn_id,
            [Setting.from_proto(setting) for setting in request.timers],
            request.cancel,
            request.timer,
        )
        blobs = inline.verified(request.inline)
        along = self._inline.writes(key, request.version, blobs)
        ends = ending(key, request.turn_id, request.calls)
        timers = self._timers.beside(key, changes, [*ends, *along])

        async def beside(fresh: bool) -> Extra:
            """Asked once it is known that the node is the owner, and that this was not applied before."""
            self._resolving.check_quota(key, request.state_bytes)
            return await timers(fresh)

        stored = await self._ownership.commit(
            node,
            key,
            request.epoch,
            request.version,
            request.root,
            request.turn_id,
            beside,
            Uploaded(request.state_bytes, request.gc_round),
        )
        self._inline.committed(key, request.version, blobs, stored.revision)
        return link_pb2.CommitReply()

    async def Commits(  # type: ignore[override]  # as Open
        self, request_iterator: AsyncIterator[link_pb2.CommitRequest], context: Any
    ) -> None:
        await serve_commits(request_iterator, context, self.Commit)

    async def Hibernated(self, request: link_pb2.HibernatedRequest, context: Any) -> link_pb2.HibernatedReply:
        key = InstanceKey.from_proto(request.key)
        await self._ownership.hibernate(_node(request.node), key, request.epoch)
        return link_pb2.HibernatedReply()

    def _welcome(self, evictions: list[link_pb2.Evict]) -> link_pb2.Welcome:
        return link_pb2.Welcome(
            coordinator=self._registry.me,
            heartbeat_ms=round(self._timing.heartbeat * 1000),
            ttl_ms=round(self._timing.ttl * 1000),
            ticket_keys=self._tickets.public_keys,
            evict=evictions,
            gc_round=self._registry.gc_round,
        )

    async def _serve(
        self, session: LinkSession, messages: AsyncIterator[link_pb2.LinkUp], context: Any
    ) -> None:
        """Until the node goes, or the session is ended here. The first of them to fail ends the stream."""
        node = session.info.id
        reading = asyncio.create_task(self._read(session, messages), name=f"read the link of {node}")
        writing = asyncio.create_task(self._write(session, context), name=f"write the link of {node}")
        parts = (session.ended, reading, writing)
        try:
            done, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for part in parts:
                part.cancel()
            await asyncio.gather(reading, writing, return_exceptions=True)
        for part in parts:
            if part in done:
                part.result()

    async def _read(self, session: LinkSession, messages: AsyncIterator[link_pb2.LinkUp]) -> None:
        async for message in messages:
            self._registry.hear(session, message)

    async def _write(self, session: LinkSession, context: Any) -> None:
        while True:
            await context.write(await session.next_to_send())


async def _registration(messages: AsyncIterator[link_pb2.LinkUp]) -> link_pb2.Register:
    try:
        async with asyncio.timeout(_FIRST_MESSAGE_TIMEOUT):
            first = await anext(messages, None)
    except TimeoutError:
        first = None
    if first is None or first.WhichOneof("kind") != "register":
        raise RoostError(Reason.BAD_REQUEST, "a link must start with a registration, at once", _NODE_FAULT)
    return first.register


def _node(name: str) -> str:
    if not is_name(name):
        raise RoostError(Reason.BAD_REQUEST, f"{name!r} is no node name", NAME_RULE)
    return name


def _check_length(what: str, text: str) -> None:
    if not 0 < len(text) <= _LONGEST_NAME:
        raise RoostError(
            Reason.BAD_REQUEST,
            f"a commit's {what} must have 1 to {_LONGEST_NAME} characters, not {len(text)}",
            _NODE_FAULT,
        )
