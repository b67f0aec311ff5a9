"""Rebalancing converges, and then leaves everything where it is."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.placement import Candidate
from coordinator.rebalance import HOME_FULL, IDLE, Instance, Node, Shift, decide, to_drain
from coordinator.records import Position, Role
from shared.identity import InstanceKey
from shared.resources import Resources, fits

SETTLE = 60.0
LONG_AGO = -1000.0
MIB = 1 << 20


def node(
    name: str,
    memory: int = 1000,
    role: Role = Role.EDGE,
    site: str = "lab",
    up: bool = True,
    draining: bool = False,
    up_since: float = LONG_AGO,
    position: Position | None = None,
) -> Node:
    capacity = Resources(memory * MIB, 1_000_000, 1_000_000)
    return Node(Candidate(name, role, position, capacity, Resources(), up, draining), site, up_since)


def instance(user: str, on: str, memory: int = 100, home: str = "", heard: float = LONG_AGO) -> Instance:
    need = Resources(memory * MIB, 100, 10)
    return Instance(InstanceKey("acme", "chef", user), on, need, LONG_AGO, heard, home)


class World:
    """Carries out at once what is decided, and counts."""

    def __init__(self, nodes: list[Node], instances: list[Instance]) -> None:
        self.nodes = {n.id: n for n in nodes}
        self.instances = {i.key: i for i in instances}
        self.now = 0.0
        self.moves: list[tuple[float, Shift]] = []

    def view(self) -> dict[str, Node]:
        def reserved(name: str) -> Resources:
            return sum((i.need for i in self.instances.values() if i.node == name), Resources())

        return {
            name: replace(n, candidate=replace(n.candidate, reserved=reserved(name)))
            for name, n in self.nodes.items()
        }

    def step(self, most: int = 2, seconds: float = 1.0) -> list[Shift]:
        self.now += seconds
        shifts = decide(self.view(), list(self.instances.values()), self.now, most, SETTLE)
        for shift in shifts:
            mine = self.instances[shift.key]
            home = shift.target if self.nodes[shift.target].candidate.role is Role.EDGE else mine.home
            self.instances[shift.key] = replace(
                mine, node=shift.target, placed=self.now, heard=self.now, home=home
            )
            self.moves.append((self.now, shift))
        return shifts

    def rest(self, steps: int = 2000) -> bool:
        """Until nothing has moved for as long as anything could take to be allowed to."""
        quiet = 0.0
        for _ in range(steps):
            quiet = 0.0 if self.step(seconds=5.0) else quiet + 5.0
            if quiet > 2 * SETTLE:
                return True
        return False


def test_back_home_from_the_cloud() -> None:
    world = World(
        [node("cloud", 9000, Role.CLOUD, "sky"), node("near"), node("home")],
        [
            instance("ana", "cloud", home="home"),
            instance("ben", "cloud"),
            instance("eve", "cloud", home="cloud"),
        ],
    )
    world.rest()
    where = {i.key.user: i.node for i in world.instances.values()}
    assert where["ana"] == "home"
    assert where["ben"] == "near", "the emptier edge, as it was on none"
    assert where["eve"] == "cloud", "somebody wants it there"


def test_no_edge_is_filled_to_the_brim_by_those_that_come_home() -> None:
    world = World(
        [node("cloud", 9000, Role.CLOUD, "sky"), node("home")],
        [instance(f"u{n}", "cloud", home="home") for n in range(12)],
    )
    assert world.rest()
    assert world.view()["home"].fill <= HOME_FULL
    assert len(world.moves) == 8


def test_a_home_that_just_came_up_is_watched_for_a_while() -> None:
    nodes = [node("cloud", 9000, Role.CLOUD, "sky"), node("home", up_since=0.0)]
    world = World(nodes, [instance("ana", "cloud", home="home")])
    assert not world.step(seconds=SETTLE - 1)
    assert world.step(seconds=2)


def test_a_full_node_shares_with_its_neighbour_but_not_with_another_site() -> None:
    full = [instance(f"u{n}", "a") for n in range(9)]
    world = World([node("a"), node("b", site="elsewhere")], full)
    assert world.rest()
    assert not world.moves
    world = World([node("a"), node("b")], full)
    assert world.rest()
    fills = sorted(n.fill for n in world.view().values())
    assert fills[1] - fills[0] < 0.3 + 0.1
    assert len(world.moves) <= 5


def test_the_idlest_goes_first_and_the_busy_stay() -> None:
    instances = [instance(f"u{n}", "a", heard=-10.0 - n) for n in range(9)]
    instances[8] = replace(instances[8], heard=-1.0)
    world = World([node("a"), node("b")], instances)
    (first,) = world.step(most=1, seconds=0.0)
    assert first.key.user == "u7"
    busy = World([node("a"), node("b")], [replace(i, heard=0.0) for i in instances])
    assert not busy.step(seconds=IDLE - 1)


def test_an_overfull_node_gives_away_to_wherever_there_is_room() -> None:
    nodes = [node("a", 500), node("b", site="elsewhere"), node("cloud", 9000, Role.CLOUD, "sky")]
    world = World(nodes, [instance(f"u{n}", "a") for n in range(7)])
    assert world.rest()
    assert world.view()["a"].fill <= 1
    assert {shift.target for _, shift in world.moves} == {"b"}, "an edge before the cloud"


def test_what_drains_goes_idlest_first_and_nothing_comes_in() -> None:
    nodes = {n.id: n for n in (node("a", draining=True), node("b"))}
    instances = [instance("ana", "a", heard=-5.0), instance("ben", "a", heard=-9.0), instance("eve", "b")]
    assert [key.user for key in to_drain(nodes, instances)] == ["ben", "ana"]
    world = World([node("a", draining=True), node("b")], [instance(f"u{n}", "b") for n in range(9)])
    assert not world.step()


# --- whatever there is -------------------------------------------------------------------------------


_nodes = st.lists(
    st.builds(
        lambda memory, role, site, up, draining: (memory, role, site, up, draining),
        st.integers(100, 3000),
        st.sampled_from([Role.EDGE, Role.EDGE, Role.CLOUD]),
        st.sampled_from(["north", "south"]),
        st.sampled_from([True, True, True, False]),
        st.sampled_from([False, False, False, True]),
    ),
    min_size=1,
    max_size=6,
)
_instances = st.lists(st.tuples(st.integers(0, 5), st.integers(10, 800), st.integers(-1, 5)), max_size=14)


def _world(specs: list[tuple[int, Role, str, bool, bool]], placed: list[tuple[int, int, int]]) -> World:
    nodes = [
        node(f"n{i}", memory, role, site, up, draining)
        for i, (memory, role, site, up, draining) in enumerate(specs)
    ]
    instances = [
        instance(f"u{i}", f"n{on % len(nodes)}", memory, "" if home < 0 else f"n{home % len(nodes)}")
        for i, (on, memory, home) in enumerate(placed)
    ]
    return World(nodes, instances)


@settings(max_examples=150, deadline=None)
@given(_nodes, _instances)
def test_it_comes_to_rest_and_moves_nobody_often(
    specs: list[tuple[int, Role, str, bool, bool]], placed: list[tuple[int, int, int]]
) -> None:
    world = _world(specs, placed)
    assert world.rest(), f"it goes on and on: {world.moves[-6:]}"
    assert len(world.moves) <= 6 * len(placed)
    times: dict[InstanceKey, list[float]] = {}
    for at, shift in world.moves:
        times.setdefault(shift.key, []).append(at)
    for moved in times.values():
        assert all(b - a >= SETTLE for a, b in pairwise(moved))


@settings(max_examples=150, deadline=None)
@given(_nodes, _instances, st.integers(0, 4))
def test_what_is_decided_can_be_done(
    specs: list[tuple[int, Role, str, bool, bool]], placed: list[tuple[int, int, int]], most: int
) -> None:
    world = _world(specs, placed)
    before = world.view()
    shifts = world.step(most, seconds=0.0)
    assert len(shifts) <= most
    assert len({shift.key for shift in shifts}) == len(shifts)
    after = world.view()
    for shift in shifts:
        target = after[shift.target]
        assert target.serves
        assert fits(Resources(), target.candidate.reserved, target.candidate.capacity)
        assert before[shift.target].candidate.up
