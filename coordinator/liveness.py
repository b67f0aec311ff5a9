"""Which nodes are lost: decided from what is observed, and from nothing else. Pure.

A node is vouched for by the coordinator that its record names. That one counts the node's silence itself.
If that coordinator is absent, any other waits one full node TTL from when it first saw it absent, so that
the nodes have time to register elsewhere. Calling a node lost moves nothing: it only lets the next Resolve
do so, by a transaction of its own. So a mistake here costs a move, never promise 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from coordinator.records import NodeRecord, NodeState, Stored


@dataclass(frozen=True, slots=True)
class LinkView:
    """A link that is open here. `revision`: of the node record that its registration wrote."""

    started_id: str
    revision: int
    heard: float


@dataclass(frozen=True, slots=True)
class Observed:
    """Times are seconds on the monotonic clock. `heard`: of nodes without a link, when they last spoke here.
    `absent_since`: of coordinators that are not in the store. `grace_from`: silence before it proves nothing
    (this process began then, or slept until then). `vouches`: our own lease is valid. `left`: nodes that said
    goodbye."""

    me: str
    vouches: bool
    ttl: float
    grace_from: float
    nodes: Mapping[str, Stored[NodeRecord]]
    links: Mapping[str, LinkView] = field(default_factory=dict)
    heard: Mapping[str, float] = field(default_factory=dict)
    absent_since: Mapping[str, float] = field(default_factory=dict)
    left: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class MarkLost:
    """Only if the record is still this one, and, if one is named, the coordinator is still absent."""

    node: Stored[NodeRecord]
    absent: str | None
    why: str


@dataclass(frozen=True, slots=True)
class EndLink:
    """The node must register again: its record is no longer what this link's registration wrote."""

    node: str
    replaced: bool  # by another daemon under the same id
    why: str


Action = MarkLost | EndLink


def decide(observed: Observed, now: float) -> list[Action]:
    actions: list[Action] = []
    for name, stored in sorted(observed.nodes.items()):
        if end := _superseded(observed, name, stored):
            actions.append(end)
        elif stored.value.state is NodeState.UP and observed.vouches:
            lost = _lost(observed, name, stored, now)
            if lost is not None:
                actions.append(lost)
    return actions


def absences(
    known: Mapping[str, float], nodes: Iterable[NodeRecord], alive: Iterable[str], me: str, now: float
) -> dict[str, float]:
    """Since when each coordinator that vouches for a node has been absent."""
    present = {*alive, me}
    named = {node.coordinator for node in nodes if node.state is NodeState.UP}
    return {c: known.get(c, now) for c in named - present}


class Pulse:
    """Notices that this process slept (suspended, starved), and what silence therefore means nothing."""

    def __init__(self, now: float, limit: float) -> None:
        """A gap between beats of more than `limit` seconds was a sleep."""
        self.grace_from = now
        self._last = now
        self._limit = limit

    def beat(self, now: float) -> None:
        if now - self._last > self._limit:
            self.grace_from = now
        self._last = now


def _superseded(observed: Observed, name: str, stored: Stored[NodeRecord]) -> EndLink | None:
    link = observed.links.get(name)
    if link is None or stored.revision <= link.revision:
        return None
    record = stored.value
    if record.info.started_id != link.started_id:
        return EndLink(name, True, f"another daemon registered as {name}")
    if record.coordinator != observed.me:
        return EndLink(name, False, f"{name} is linked to {record.coordinator} now")
    if record.state is NodeState.LOST:
        return EndLink(name, False, f"{name} was silent and counts as lost")
    return None


def _lost(observed: Observed, name: str, stored: Stored[NodeRecord], now: float) -> MarkLost | None:
    coordinator = stored.value.coordinator
    if coordinator == observed.me:
        if name in observed.left:
            return MarkLost(stored, None, "it said goodbye")
        link = observed.links.get(name)
        heard = link.heard if link else observed.heard.get(name, observed.grace_from)
        silence = now - max(heard, observed.grace_from)
        why = f"silent for {silence:.1f} s"
        return MarkLost(stored, None, why) if silence > observed.ttl else None
    since = observed.absent_since.get(coordinator)
    if since is None:
        return None
    absence = now - max(since, observed.grace_from)
    why = f"its coordinator {coordinator} has been gone for {absence:.1f} s"
    return MarkLost(stored, coordinator, why) if absence > observed.ttl else None
