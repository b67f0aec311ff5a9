"""Which instances move without anybody having asked: decided from plain values. Pure.

Three reasons, in this order:
- `overfull`: a node has promised more than it has (it came back smaller).
- `home`: an instance waits in the cloud while an edge has room, the one that it was on before all others.
- `level`: of the nodes of one site and role, one is much fuller than another. Only within a site, since users
  who are further away from their instance feel that more than a full node.

Always true: what was heard of a moment ago is left alone, and a move gives up when a turn runs; of those that
may move the idlest goes first; a target is never over capacity, draining, lost or just come up.

Why it comes to rest: a `home` move ends on an edge that stays below HOME_FULL, and no `level` move lifts its
target as high as its source was, so the list of all fills, sorted from the top, only ever falls; `overfull`
can't come of either. Why it doesn't flap: each move needs a gap that is wider than what one move closes, the
instance has been where it is for `settle` seconds, and so has its target been up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from coordinator.placement import Candidate, Client, NoRoom, choose, fill
from coordinator.records import Role
from shared.identity import InstanceKey
from shared.resources import Resources, fits

IDLE = 5.0  # seconds without a sign of life
HOME_FULL = 0.8  # an edge is filled up to here by those that come home
LEVEL_FROM = 0.5  # nobody feels a node that is emptier
LEVEL_GAP = 0.3  # between the fills of two nodes


@dataclass(frozen=True, slots=True)
class Node:
    """`up_since` in monotonic seconds: since when it has been up without a break, as far as was seen."""

    candidate: Candidate
    site: str
    up_since: float

    @property
    def id(self) -> str:
        return self.candidate.id

    @property
    def fill(self) -> float:
        return fill(self.candidate.reserved, self.candidate.capacity)

    @property
    def serves(self) -> bool:
        return self.candidate.up and not self.candidate.draining


@dataclass(frozen=True, slots=True)
class Instance:
    """One that runs. `placed` and `heard` in monotonic seconds: since when it has had this owner, and when
    its record last changed, both as far as was seen. `home`: see InstanceRecord."""

    key: InstanceKey
    node: str
    need: Resources
    placed: float
    heard: float
    home: str = ""


@dataclass(frozen=True, slots=True)
class Shift:
    key: InstanceKey
    target: str
    why: str


def to_drain(nodes: Mapping[str, Node], instances: Sequence[Instance]) -> list[InstanceKey]:
    """What runs on nodes that are draining, the idlest first."""
    leaving = [i for i in instances if i.node in nodes and nodes[i.node].candidate.draining]
    return [i.key for i in sorted(leaving, key=_idlest)]


def decide(
    nodes: Mapping[str, Node], instances: Sequence[Instance], now: float, most: int, settle: float
) -> list[Shift]:
    """At most `most` moves, each decided as if those before it were done."""
    free = [i for i in instances if now - i.placed >= settle and now - i.heard >= IDLE and i.node in nodes]
    view = _View(dict(nodes), sorted(free, key=_idlest), now, settle)
    shifts: list[Shift] = []
    for rule in (_overfull, _home, _level):
        while len(shifts) < most and (shift := rule(view)):
            view.move(shift)
            shifts.append(shift)
    return shifts


@dataclass(slots=True)
class _View:
    nodes: dict[str, Node]
    free: list[Instance]  # the idlest first
    now: float
    settle: float

    def settled(self, node: Node) -> bool:
        return node.serves and self.now - node.up_since >= self.settle

    def after(self, target: Node, instance: Instance) -> float:
        return fill(target.candidate.reserved + instance.need, target.candidate.capacity)

    def move(self, shift: Shift) -> None:
        instance = next(i for i in self.free if i.key == shift.key)
        self.free.remove(instance)
        self._add(instance.node, Resources() - instance.need)
        self._add(shift.target, instance.need)

    def nearest(self, instance: Instance, targets: Sequence[Node], near: str) -> str | None:
        """The best of `targets`, seen from the node `near`, which was chosen for its user."""
        known = self.nodes.get(near)
        client = Client(known.candidate.position if known else None)
        chosen = choose(instance.need, [t.candidate for t in targets], client)
        return None if isinstance(chosen, NoRoom) else chosen.node

    def _add(self, name: str, need: Resources) -> None:
        node = self.nodes[name]
        reserved = node.candidate.reserved + need
        self.nodes[name] = replace(node, candidate=replace(node.candidate, reserved=reserved))


def _overfull(view: _View) -> Shift | None:
    for instance in view.free:
        source = view.nodes[instance.node]
        if not source.candidate.up or fits(Resources(), source.candidate.reserved, source.candidate.capacity):
            continue
        others = [n for n in view.nodes.values() if n.id != source.id and view.settled(n)]
        if target := view.nearest(instance, others, source.id):
            return Shift(instance.key, target, f"{source.id} has promised more than it has")
    return None


def _home(view: _View) -> Shift | None:
    for instance in view.free:
        source = view.nodes[instance.node]
        if source.candidate.role is not Role.CLOUD or instance.home == source.id:
            continue
        edges = [
            n
            for n in view.nodes.values()
            if n.candidate.role is Role.EDGE and view.settled(n) and view.after(n, instance) <= HOME_FULL
        ]
        own = [n for n in edges if n.id == instance.home]
        if target := view.nearest(instance, own or edges, instance.home):
            why = "where it was before" if own else "an edge has room for it"
            return Shift(instance.key, target, f"back from the cloud: {why}")
    return None


def _level(view: _View) -> Shift | None:
    for source in sorted(view.nodes.values(), key=lambda n: (-n.fill, n.id)):
        if source.fill < LEVEL_FROM:
            return None
        if not view.settled(source):
            continue
        for instance in view.free:
            if instance.node == source.id and (target := _emptier(view, source, instance)):
                why = f"{source.id} is {source.fill:.0%} full, {target.id} {target.fill:.0%}"
                return Shift(instance.key, target.id, why)
    return None


def _emptier(view: _View, source: Node, instance: Instance) -> Node | None:
    there = [
        n
        for n in view.nodes.values()
        if (n.site, n.candidate.role) == (source.site, source.candidate.role)
        and view.settled(n)
        and source.fill - n.fill >= LEVEL_GAP
        and view.after(n, instance) < source.fill
        and fits(instance.need, n.candidate.reserved, n.candidate.capacity)
    ]
    return min(there, key=lambda n: (n.fill, n.id), default=None)


def _idlest(instance: Instance) -> tuple[float, str]:
    return (instance.heard, str(instance.key))
