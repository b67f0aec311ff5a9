"""Where a new instance goes: the nearest edge with room, and the cloud when there is none. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from coordinator.records import Position, Role
from shared.resources import Resources, fits, lacking

# Light in fibre goes at about 2/3 of c, 200 km a millisecond (ITU-T G.652 fibre, group index 1.468), so a
# round trip over d km takes at least d/100 ms; what is not distance (last mile, switches) counts as 1 ms.
KM_PER_RTT_MS = 100.0
OVERHEAD_MS = 1.0
UNKNOWN_RTT_MS = (
    50.0  # neither measured nor positions known: worse than a node near by, better than a far one
)
_EARTH_RADIUS_KM = 6371.0
_NAMED = 5  # nodes that a sentence names before it says "and 7 more"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A node as the coordinator sees it. `refused` says, if it just refused, in what state it is."""

    id: str
    role: Role
    position: Position | None
    capacity: Resources
    reserved: Resources
    up: bool
    draining: bool
    refused: str = ""


@dataclass(frozen=True, slots=True)
class Client:
    """What the user's program told: where it is, round trips that it measured (ms, by node), and the nodes
    that just refused or failed it."""

    position: Position | None = None
    rtt_ms: Mapping[str, float] = field(default_factory=dict)
    exclude: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Placement:
    node: str
    why: str


@dataclass(frozen=True, slots=True)
class NoRoom:
    why: str


@dataclass(frozen=True, slots=True)
class _Ranked:
    candidate: Candidate
    rtt_ms: float
    basis: str

    def __str__(self) -> str:
        if self.basis == "unknown":
            return "its distance is not known"
        return f"about {self.rtt_ms:.1f} ms {self.basis}"

    @property
    def order(self) -> tuple[float, float, str]:
        """Nearest first; of equally near ones the emptier; then by name, so that all decide alike."""
        filled = fill(self.candidate.reserved, self.candidate.capacity)
        return (round(self.rtt_ms, 3), filled, self.candidate.id)


def choose(need: Resources, candidates: Sequence[Candidate], client: Client) -> Placement | NoRoom:
    """The nearest edge that has room for `need`, else the nearest cloud node that has, else NoRoom.

    Never a node that is down, draining, excluded, has just refused, or is too full.
    """
    objections = {c.id: _objection(c, need, client) for c in candidates}
    fit = [_rank(c, client) for c in candidates if not objections[c.id]]
    edges = sorted((r for r in fit if r.candidate.role is Role.EDGE), key=lambda r: r.order)
    clouds = sorted((r for r in fit if r.candidate.role is Role.CLOUD), key=lambda r: r.order)
    if edges:
        return Placement(edges[0].candidate.id, _nearest(edges))
    edge_objections = [f"{c.id} {objections[c.id]}" for c in candidates if c.role is Role.EDGE]
    if clouds:
        return Placement(clouds[0].candidate.id, _cloud(edge_objections))
    if not candidates:
        return NoRoom("no node has ever registered")
    return NoRoom("no node has room: " + _and_more([f"{c.id} {objections[c.id]}" for c in candidates]))


def expected_rtt_ms(candidate: Candidate, client: Client) -> float:
    """What the client measured, else an estimate by great-circle distance, else a middling guess."""
    return _rank(candidate, client).rtt_ms


def distance_km(a: Position, b: Position) -> float:
    """Along the great circle (haversine)."""
    la, lb = math.radians(a.latitude), math.radians(b.latitude)
    dlat, dlon = lb - la, math.radians(b.longitude - a.longitude)
    h = math.sin(dlat / 2) ** 2 + math.cos(la) * math.cos(lb) * math.sin(dlon / 2) ** 2
    return 2 * _EARTH_RADIUS_KM * math.asin(math.sqrt(min(1.0, h)))


def _rank(candidate: Candidate, client: Client) -> _Ranked:
    measured = client.rtt_ms.get(candidate.id)
    if measured is not None:
        return _Ranked(candidate, measured, "as measured")
    if candidate.position is not None and client.position is not None:
        km = distance_km(candidate.position, client.position)
        return _Ranked(candidate, km / KM_PER_RTT_MS + OVERHEAD_MS, "by distance")
    return _Ranked(candidate, UNKNOWN_RTT_MS, "unknown")


def _objection(candidate: Candidate, need: Resources, client: Client) -> str:
    """Why it can't be taken, as what one says after its name; empty if it can."""
    if not candidate.up:
        return "is lost"
    if candidate.refused:
        return candidate.refused
    if candidate.id in client.exclude:
        return "just failed the client"
    if candidate.draining:
        return "is draining"
    if absent := lacking(need, Resources(), candidate.capacity):
        return f"has no {absent[0]}"
    if taken := lacking(need, candidate.reserved, candidate.capacity):
        return f"has no {taken[0]} left"
    if not fits(need, candidate.reserved, candidate.capacity):
        return "is full" if fits(need, Resources(), candidate.capacity) else "is too small"
    return ""


def fill(reserved: Resources, capacity: Resources) -> float:
    """The share of a node's scarcest resource that is promised."""
    pairs = (
        (reserved.memory_bytes, capacity.memory_bytes),
        (reserved.cpu_millis, capacity.cpu_millis),
        (reserved.pids, capacity.pids),
    )
    return max(used / whole if whole else 1.0 for used, whole in pairs)


def _nearest(edges: Sequence[_Ranked]) -> str:
    best, others = edges[0], edges[1:]
    if not others:
        return f"the only edge with room: {best}"
    listed = _and_more([f"{r.candidate.id}: {r}" for r in others])
    if others[0].order[0] == best.order[0]:
        return f"emptiest of the nearest among {len(edges)} edges with room: {best} ({listed})"
    return f"nearest of {len(edges)} edges with room: {best} ({listed})"


def _cloud(edge_objections: Sequence[str]) -> str:
    if not edge_objections:
        return "there is no edge; the cloud takes it"
    return f"no edge with room: {_and_more(edge_objections)}; the cloud takes over"


def _and_more(parts: Iterable[str]) -> str:
    named = list(parts)
    rest = len(named) - _NAMED
    return ", ".join(named[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")
