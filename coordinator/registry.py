"""The links that this coordinator holds, and the nodes that it vouches for."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from coordinator.cache import Cache
from coordinator.links import LinkSession
from coordinator.liveness import EndLink, LinkView, MarkLost, Observed, Pulse, absences, decide
from coordinator.ownership import Ownership
from coordinator.presence import Presence
from coordinator.records import (
    COORDINATORS,
    InstanceRecord,
    NodeInfo,
    NodeRecord,
    NodeState,
    Phase,
    Stored,
    coordinator_key,
    node_key,
)
from coordinator.store.base import Expect, Put, Store
from protos.v1 import link_pb2
from shared.errors import Reason, RoostError
from shared.identity import InstanceKey

log = logging.getLogger(__name__)

_ATTEMPTS = 5  # to write a node's record; another writer is a second registration, or a drain
_READS = 64  # of held instances at a time


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds. A node is lost after `ttl` of silence."""

    heartbeat: float
    ttl: float


class Registry:
    """Registers nodes, and says which are lost (`reconcile`, to be run every heartbeat)."""

    def __init__(
        self,
        store: Store,
        cache: Cache,
        ownership: Ownership,
        presence: Presence,
        timing: Timing,
        clock: Callable[[], float],
    ) -> None:
        self.links: dict[str, LinkSession] = {}
        self._store = store
        self._cache = cache
        self._ownership = ownership
        self._presence = presence
        self._timing = timing
        self._clock = clock
        self._pulse = Pulse(clock(), timing.ttl / 2)
        self._heard: dict[str, float] = {}
        self._absent_since: dict[str, float] = {}
        self._asleep: list[Stored[InstanceRecord]] = []
        self._left: set[str] = set()  # nodes that said goodbye, and have not registered here since
        self.on_goodbye: Callable[[str], None] = lambda why: None

    @property
    def me(self) -> str:
        return self._presence.me.id

    @property
    def gc_round(self) -> int:
        return self._cache.gc_round

    # --- links -------------------------------------------------------------------------------

    async def register(self, request: link_pb2.Register) -> tuple[LinkSession, list[link_pb2.Evict]]:
        """A new link, and what the node holds that is no longer its own. BAD_REQUEST, STORE_UNAVAILABLE."""
        info = NodeInfo.from_proto(request.node)
        if not self._presence.vouches(self._clock()):
            raise RoostError(
                Reason.COORDINATOR_UNREACHABLE,
                f"coordinator {self.me} can't vouch for nodes just now: its own lease in etcd is not renewed",
                "register with another coordinator, or again in a moment",
            )
        session = LinkSession(info, await self._write_up(info), self._clock, lambda: self.gc_round)
        older = self.links.get(info.id)
        if older is not None and older.revision > session.revision:
            raise _over(session, replaced=older.info.started_id != info.started_id)
        self.links[info.id] = session
        self._left.discard(info.id)
        if older is not None:
            older.end(_over(older, replaced=older.info.started_id != info.started_id))
        log.info("node %s registered from %s, holding %d", info.id, info.address, len(request.instances))
        try:
            evictions = await self._no_longer_its_own(info.id, request.instances)
        except BaseException:
            self.closed(session)
            raise
        self._note_asleep(info.id, request.instances)
        return session, evictions

    def closed(self, session: LinkSession) -> None:
        """The stream is over. From now on the node is silent; it is not lost yet."""
        session.forget()
        node = session.info.id
        if self.links.get(node) is session:
            del self.links[node]
            self._heard[node] = session.heard
            log.info("the link of %s ended", node)

    def hear(self, session: LinkSession, message: link_pb2.LinkUp) -> None:
        if message.HasField("goodbye"):
            if self.links.get(session.info.id) is session:
                self._left.add(session.info.id)
                self.on_goodbye(f"{session.info.id} said goodbye")
            return
        session.hear(message, acknowledge=self._presence.vouches(self._clock()))

    def end_all(self, error: RoostError) -> None:
        for session in list(self.links.values()):
            session.end(error)

    def is_fresh(self, silence: float) -> bool:
        """Has a node that was heard `silence` seconds ago missed nothing that matters?"""
        return silence <= 2 * self._timing.heartbeat

    def evict_moved(self, old: InstanceRecord, new: InstanceRecord) -> None:
        """Tells the former owner, if its link is here. It would find out anyway, at its next commit."""
        if session := self.links.get(old.node):
            why = new.why if new.node == old.node else f"{new.node} owns it now: {new.why}"
            session.evict(old.key, new.epoch - 1, why)

    def salvage(self, hashes: Sequence[str]) -> int:
        """Asks the nodes that are linked here for their copies of these blobs; how many they are."""
        for session in self.links.values():
            session.send(link_pb2.LinkDown(salvage=link_pb2.Salvage(hashes=hashes)))
        return len(self.links)

    # --- loss --------------------------------------------------------------------------------

    def beat(self) -> None:
        self._pulse.beat(self._clock())

    async def reconcile(self) -> None:
        """One pass: marks lost nodes, ends links that were overtaken, notes what no longer runs."""
        self.beat()
        now = self._clock()
        observed = self._observe(now)
        for action in decide(observed, now):
            match action:
                case EndLink(node, replaced, why):
                    log.info("%s; its link here is ended", why)
                    if session := self.links.get(node):  # it may have ended during this pass
                        session.end(_over(session, replaced))
                case MarkLost():
                    await self._mark_lost(action)
        while self._asleep:
            asleep = self._asleep.pop()
            try:
                await self._ownership.hibernate_if_unchanged(asleep)
            except RoostError:
                self._asleep.append(asleep)
                raise

    def _observe(self, now: float) -> Observed:
        nodes = {s.value.info.id: s for s in self._cache.nodes.records.values()}
        self._absent_since = absences(
            self._absent_since,
            (s.value for s in nodes.values()),
            (key.removeprefix(COORDINATORS) for key in self._cache.coordinators.records),
            self.me,
            now,
        )
        return Observed(
            me=self.me,
            vouches=self._presence.vouches(now),
            ttl=self._timing.ttl,
            grace_from=max(self._pulse.grace_from, self._presence.since),
            nodes=nodes,
            links={n: LinkView(s.info.started_id, s.revision, s.heard) for n, s in self.links.items()},
            heard=self._heard,
            absent_since=self._absent_since,
            left=frozenset(self._left),
        )

    async def _mark_lost(self, action: MarkLost) -> None:
        node = action.node.value
        guards = [Expect(node_key(node.info.id), action.node.revision)]
        if action.absent is not None:
            guards.append(Expect(coordinator_key(action.absent), 0))
        lost = replace(node, state=NodeState.LOST)
        result = await self._store.txn(guards, [Put(node_key(node.info.id), lost.encode())])
        if result.succeeded:
            self._cache.nodes.learn(node_key(node.info.id), Stored(lost, result.revision))
            log.warning("node %s is lost: %s", node.info.id, action.why)
        else:  # it spoke elsewhere, or its coordinator is back: look again at what is
            self._cache.nodes.lister.wake(f"{node.info.id} changed meanwhile")
            self._cache.coordinators.lister.wake(f"{node.info.id} changed meanwhile")

    # --- registration ------------------------------------------------------------------------

    async def _write_up(self, info: NodeInfo) -> int:
        """Records that the node is up and linked here; the revision of that."""

        def up(old: NodeRecord | None) -> NodeRecord:
            return NodeRecord(info, self.me, NodeState.UP, old is not None and old.draining)

        return (await self.change_node(info.id, up)).revision

    async def change_node(
        self, node: str, change: Callable[[NodeRecord | None], NodeRecord]
    ) -> Stored[NodeRecord]:
        """Writes what `change` makes of the node's record, read anew whenever another writer was faster."""
        name = node_key(node)
        for _ in range(_ATTEMPTS):
            found = await self._store.get(name)
            new = change(NodeRecord.decode(found).value if found else None)
            guard = Expect(name, found.revision if found else 0)
            result = await self._store.txn([guard], [Put(name, new.encode())])
            if result.succeeded:
                stored = Stored(new, result.revision)
                self._cache.nodes.learn(name, stored)
                return stored
        raise RoostError(
            Reason.STORE_UNAVAILABLE,
            f"the record of node {node} changed {_ATTEMPTS} times while it was being written",
            f"do two daemons run as {node}? give each an id of its own",
        )

    async def _no_longer_its_own(self, node: str, held: Sequence[link_pb2.Held]) -> list[link_pb2.Evict]:
        """By what the store says now: a cache could call for the end of an instance that is rightly there.
        It may say that all is well, though: if it is behind, the node's next commit is refused."""
        held = [h for h in held if not self._owns(node, h)]
        evictions = []
        for start in range(0, len(held), _READS):
            some = held[start : start + _READS]
            found = await asyncio.gather(*(self._ownership.read(InstanceKey.from_proto(h.key)) for h in some))
            for one, stored in zip(some, found, strict=True):
                record = stored.value if stored else None
                if record is None or (record.node, record.epoch) != (node, one.epoch):
                    owner = (
                        f"{record.node} owns it in epoch {record.epoch}" if record else "it was never placed"
                    )
                    evictions.append(link_pb2.Evict(key=one.key, epoch=one.epoch, why=owner))
        return evictions

    def _owns(self, node: str, held: link_pb2.Held) -> bool:
        stored = self._cache.instance(InstanceKey.from_proto(held.key))
        return stored is not None and (stored.value.node, stored.value.epoch) == (node, held.epoch)

    def _note_asleep(self, node: str, held: Sequence[link_pb2.Held]) -> None:
        """What is recorded as live there but does not run (the daemon lost its jails) frees its room."""
        live = {InstanceKey.from_proto(h.key) for h in held if h.live}
        for key, record in self._cache.instances_of(node).items():
            stored = self._cache.instance(key)
            if record.phase is Phase.LIVE and key not in live and stored is not None:
                self._asleep.append(stored)


def _over(session: LinkSession, replaced: bool) -> RoostError:
    node = session.info.id
    if replaced:
        return RoostError(
            Reason.NODE_UNKNOWN,
            f"another daemon registered as {node}, and the newer one counts",
            "give each node an id of its own",
        )
    return RoostError(
        Reason.COORDINATOR_UNREACHABLE,
        f"this link of {node} is over: a later event replaced it",
        "register again",
    )
