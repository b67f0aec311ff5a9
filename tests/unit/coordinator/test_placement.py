from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from coordinator.placement import (
    KM_PER_RTT_MS,
    OVERHEAD_MS,
    UNKNOWN_RTT_MS,
    Candidate,
    Client,
    NoRoom,
    Placement,
    choose,
    distance_km,
    expected_rtt_ms,
)
from coordinator.records import Position, Role
from shared.resources import Resources, fits

NEED = Resources(100, 100, 10)
OSLO, PARIS, ROME = Position(59.9, 10.8), Position(48.9, 2.4), Position(41.9, 12.5)


def node(id: str, role: Role = Role.EDGE, **changes: object) -> Candidate:
    values: dict[str, object] = {
        "position": None,
        "capacity": Resources(1000, 1000, 100),
        "reserved": Resources(),
        "up": True,
        "draining": False,
    }
    return Candidate(id=id, role=role, **{**values, **changes})  # type: ignore[arg-type]


FULL = {"reserved": Resources(950, 0, 0)}


def test_who_needs_a_device_goes_where_one_is_left() -> None:
    need = Resources(100, 100, 10, (("gpu", 1),))
    room = Resources(1000, 1000, 100)
    two = Resources(1000, 1000, 100, (("bell", 1), ("gpu", 2)))
    used = Resources(10, 10, 1, (("gpu", 2),))
    none, taken, free = (
        node("none", capacity=room),
        node("taken", capacity=two, reserved=used),
        node("free", capacity=two),
    )
    found = choose(need, [none, taken, free], Client())
    assert isinstance(found, Placement)
    assert found.node == "free"
    assert choose(need, [none, taken], Client()) == NoRoom(
        "no node has room: none has no gpu, taken has no gpu left"
    )
    assert not fits(need, Resources(), room)
    assert fits(need, used - need, two)
    assert used + need - need == used
    assert (need - need).devices == (), "what is equal looks alike"


# --- what it says ----------------------------------------------------------------------------------


def test_the_nearest_of_several_is_named_with_its_distance() -> None:
    found = choose(NEED, [node("oslo", position=OSLO), node("paris", position=PARIS)], Client(ROME))
    assert found == Placement(
        "paris", "nearest of 2 edges with room: about 12.1 ms by distance (oslo: about 21.0 ms by distance)"
    )


def test_a_measurement_counts_more_than_a_distance() -> None:
    client = Client(PARIS, {"oslo": 2.1, "paris": 9.8})
    found = choose(NEED, [node("oslo", position=OSLO), node("paris", position=PARIS)], client)
    assert found == Placement(
        "oslo", "nearest of 2 edges with room: about 2.1 ms as measured (paris: about 9.8 ms as measured)"
    )


def test_the_only_edge_is_said_to_be() -> None:
    assert choose(NEED, [node("e"), node("f", **FULL)], Client()) == Placement(
        "e", "the only edge with room: its distance is not known"
    )


def test_of_equally_near_ones_the_emptier() -> None:
    nodes = [
        node("a", reserved=Resources(500, 0, 0)),
        node("b", reserved=Resources(100, 200, 0)),
        node("c", **FULL),
    ]
    found = choose(NEED, nodes, Client())
    assert isinstance(found, Placement)
    assert found.node == "b"
    assert found.why.startswith("emptiest of the nearest among 2 edges with room")


def test_the_cloud_takes_over_and_it_is_said_why() -> None:
    nodes = [
        node("cloud-1", Role.CLOUD),
        node("edge-1", **FULL),
        node("edge-2", up=False),
        node("edge-3", draining=True),
        node("edge-4"),
        node("edge-5", refused="does not answer"),
    ]
    assert choose(NEED, nodes, Client(exclude=frozenset({"edge-4"}))) == Placement(
        "cloud-1",
        "no edge with room: edge-1 is full, edge-2 is lost, edge-3 is draining, edge-4 just failed the "
        "client, edge-5 does not answer; the cloud takes over",
    )


def test_no_room_names_every_reason() -> None:
    tiny = node("tiny", capacity=Resources(50, 1000, 100))
    found = choose(NEED, [tiny, node("cloud", Role.CLOUD, **FULL)], Client())
    assert found == NoRoom("no node has room: tiny is too small, cloud is full")
    assert choose(NEED, [], Client()) == NoRoom("no node has ever registered")


def test_a_sentence_does_not_grow_with_the_mesh() -> None:
    found = choose(NEED, [node(f"edge-{i}") for i in range(100)], Client())
    assert isinstance(found, Placement)
    assert "and 94 more" in found.why
    assert len(found.why) < 400


def test_an_edge_however_far_comes_before_the_cloud() -> None:
    nodes = [node("cloud", Role.CLOUD, position=PARIS), node("edge", position=OSLO)]
    found = choose(NEED, nodes, Client(PARIS))
    assert isinstance(found, Placement)
    assert found.node == "edge"


def test_no_edge_at_all() -> None:
    assert choose(NEED, [node("c", Role.CLOUD)], Client()) == Placement(
        "c", "there is no edge; the cloud takes it"
    )


# --- distances -------------------------------------------------------------------------------------


def test_distances() -> None:
    assert math.isclose(distance_km(OSLO, PARIS), 1341, rel_tol=0.01)
    assert math.isclose(distance_km(Position(0, 179.9), Position(0, -179.9)), 22.2, rel_tol=0.01)
    assert math.isclose(distance_km(Position(90, 0), Position(-90, 77)), 20015, rel_tol=0.01)
    assert expected_rtt_ms(node("n", position=PARIS), Client(PARIS)) == OVERHEAD_MS
    assert expected_rtt_ms(node("n"), Client(PARIS)) == UNKNOWN_RTT_MS
    assert expected_rtt_ms(node("n", position=PARIS), Client()) == UNKNOWN_RTT_MS


positions = st.builds(Position, st.floats(-90, 90), st.floats(-180, 180))


@given(positions, positions)
def test_distance_is_symmetric_and_at_most_half_the_earth(a: Position, b: Position) -> None:
    assert math.isclose(distance_km(a, b), distance_km(b, a), abs_tol=1e-6)
    assert 0 <= distance_km(a, b) <= 20016
    estimate = expected_rtt_ms(node("n", position=a), Client(b))
    assert math.isclose(estimate, distance_km(a, b) / KM_PER_RTT_MS + OVERHEAD_MS, rel_tol=1e-9, abs_tol=1e-9)


# --- properties ------------------------------------------------------------------------------------


def up_to(most: int) -> st.SearchStrategy[Resources]:
    amounts = st.integers(0, most)
    return st.builds(Resources, amounts, amounts, amounts)


# Chosen so that most nodes have room and some have not: with even odds in each of the three, none would.
needs, promised, capacities = up_to(3), up_to(4), up_to(30)
ids = st.sampled_from([f"n{i}" for i in range(8)])
candidates = st.lists(
    st.builds(
        Candidate,
        id=ids,
        role=st.sampled_from(Role),
        position=st.none() | positions,
        capacity=capacities,
        reserved=promised,
        up=st.sampled_from([True, True, False]),
        draining=st.sampled_from([False, False, True]),
        refused=st.sampled_from(["", "", "is full"]),
    ),
    unique_by=lambda c: c.id,
    max_size=8,
)
clients = st.builds(
    Client,
    position=st.none() | positions,
    rtt_ms=st.dictionaries(ids, st.floats(0, 500)),
    exclude=st.frozensets(ids, max_size=3),
)


def eligible(need: Resources, candidate: Candidate, client: Client) -> bool:
    return (
        candidate.up
        and not candidate.draining
        and not candidate.refused
        and candidate.id not in client.exclude
        and fits(need, candidate.reserved, candidate.capacity)
    )


@given(needs, candidates, clients)
def test_the_choice_is_the_nearest_eligible_edge_then_cloud(
    need: Resources, nodes: list[Candidate], client: Client
) -> None:
    could = [c for c in nodes if eligible(need, c, client)]
    found = choose(need, nodes, client)
    assert found.why
    if not could:
        assert isinstance(found, NoRoom)
        return
    assert isinstance(found, Placement)
    chosen = next(c for c in nodes if c.id == found.node)
    assert chosen in could
    edges = [c for c in could if c.role is Role.EDGE]
    assert chosen.role is (Role.EDGE if edges else Role.CLOUD)
    nearest = min(expected_rtt_ms(c, client) for c in could if c.role is chosen.role)
    assert expected_rtt_ms(chosen, client) <= nearest + 0.001


@given(needs, candidates, clients, st.randoms())
def test_the_order_in_which_nodes_are_known_does_not_matter(
    need: Resources, nodes: list[Candidate], client: Client, dice: object
) -> None:
    shuffled = list(nodes)
    dice.shuffle(shuffled)  # type: ignore[attr-defined]
    first, second = choose(need, nodes, client), choose(need, shuffled, client)
    assert type(first) is type(second)
    if isinstance(first, Placement) and isinstance(second, Placement):
        assert first.node == second.node


@given(needs, candidates, clients)
def test_excluding_the_choice_gives_another_or_none(
    need: Resources, nodes: list[Candidate], client: Client
) -> None:
    excluded = client.exclude
    for _ in range(len(nodes) + 1):
        found = choose(need, nodes, Client(client.position, client.rtt_ms, excluded))
        if isinstance(found, NoRoom):
            return
        assert found.node not in excluded
        excluded |= {found.node}
    raise AssertionError("it ran out of nodes but not of answers")
