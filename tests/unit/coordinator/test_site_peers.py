from __future__ import annotations

from dataclasses import replace

from coordinator.records import NodeRecord, NodeState
from coordinator.site_peers import MOST, peers_of
from shared.hashing import ranked
from tests.unit.coordinator.support import info


def node(name: str, site: str = "lab", state: NodeState = NodeState.UP) -> NodeRecord:
    return NodeRecord(replace(info(name), site=site), "me", state, False)


def test_a_node_hears_of_the_others_of_its_site_that_are_up() -> None:
    nodes = [node("a"), node("b"), node("c", "elsewhere"), node("d", state=NodeState.LOST)]
    assert peers_of(nodes[0], nodes) == (("b", "b:1"),)


def test_of_many_it_hears_of_some_and_always_of_the_same() -> None:
    nodes = [node(f"n{i}") for i in range(100)]
    told = peers_of(nodes[0], nodes)
    assert len(told) == MOST
    assert peers_of(nodes[0], reversed(nodes)) == told


def test_one_that_goes_changes_nothing_among_the_others() -> None:
    names = [f"n{i}" for i in range(20)]
    before = ranked("key", names)
    assert sorted(before) == sorted(names)
    gone = before[3]
    assert ranked("key", [n for n in names if n != gone]) == [n for n in before if n != gone]
    assert ranked("another", names) != before
