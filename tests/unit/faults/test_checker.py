"""The checker finds what is wrong in histories written by hand, and nothing in those that are right."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.faults.checker import check
from tests.faults.history import Held, History, Op, Told


def op(
    at: float,
    number: int | None,
    shows: list[int] | None = None,
    where: str = "a1.1",
    turn: str = "",
    client: str = "c1",
    **more: object,
) -> Op:
    """From `at` to `at + 1`. `shows`: the list in its reply; None: no reply came. `where`: node,
    epoch, version."""
    turn = turn or f"t{number}"
    if shows is None:
        return Op(client, "ana", turn, number, at, at + 1, "info", error="DEADLINE")
    node, epoch, version = where[0], *map(int, where[1:].split("."))
    receipt = Told(node, epoch, version, "new" if version == 1 else "live", version - 1)
    receipt = replace(receipt, **more)
    reply = json.dumps({"state": shows, "sqlite": shows})
    return Op(client, "ana", turn, number, at, at + 1, "ok", reply, receipt)


def held(*records: str) -> list[Held]:
    """Each as node, epoch, version and turn: "a1.1 t7"."""
    found = []
    for revision, text in enumerate(records):
        where, _, turn = text.partition(" ")
        epoch, version = map(int, where[1:].split("."))
        found.append(Held(revision, "ana", epoch, where[0], version, f"root {version}", turn))
    return found


def rules(*ops: Op, final: list[int] | None, records: list[Held] | None = None) -> set[str]:
    finals = {} if final is None else {"ana": final}
    return {v.rule for v in check(History(list(ops), records or [], finals))}


GOOD = (
    op(0, 1, [1], "a1.1"),
    op(2, 2, [1, 2], "a1.2"),
    op(3, 3),  # never answered
    op(4.5, 3, [1, 2, 3], "b2.3", replayed=True, resumed_version=3),  # but applied
    op(6, None, [1, 2, 3], "b2.4", turn="r1"),
    op(6.5, 4, [1, 2, 3, 4], "b2.5", client="c2"),  # while the read was under way
)
RECORDS = held("a1.0", "a1.1 t1", "a1.2 t2", "a1.3 t3", "b2.3 t3", "b2.4 r1", "b2.4 r1", "b2.5 t4")


def test_a_good_history() -> None:
    assert check(History(list(GOOD), RECORDS, {"ana": [1, 2, 3, 4]})) == []


def test_what_is_unknown_may_be_there_or_not() -> None:
    first = op(0, 1, [1], "a1.1")
    assert rules(first, op(2, 2), final=[1]) == set()
    assert rules(first, op(2, 2), final=[1, 2]) == set()


def test_what_was_never_answered_may_be_applied_late() -> None:
    """Its client went on; the order of its own numbers only binds those that were acknowledged."""
    assert rules(op(0, 1), op(2, 2, [2], "a1.1"), final=[2, 1]) == set()


def test_two_at_once_may_come_in_any_order() -> None:
    one, two = op(0, 1, [2, 1], "a1.2"), op(0.5, 2, [2], "a1.1", client="c2")
    assert rules(one, two, final=[2, 1]) == set()


def test_users_are_judged_apart() -> None:
    others = [replace(o, user="ben") for o in GOOD]
    history = History([*GOOD, *others], [], {"ana": [1, 2, 3, 4], "ben": [1, 2, 3]})
    assert {(v.rule, v.user) for v in check(history)} == {("lost", "ben"), ("forked", "ben")}


def test_a_saved_history_is_the_same(tmp_path: Path) -> None:
    history = History(list(GOOD), RECORDS, {"ana": [1, 2, 3, 4]})
    history.save(tmp_path / "history")
    assert History.load(tmp_path / "history") == history


A, B = op(0, 1, [1], "a1.1"), op(2, 2, [1, 2], "a1.2")


@pytest.mark.parametrize(
    ("rule", "ops", "final"),
    [
        ("unreadable", [A, B], None),
        ("lost", [A, B], [1]),
        ("lost", [A, B], []),
        ("doubled", [A, B], [1, 2, 2]),
        ("doubled", [A, op(2, 2, [1, 2, 2], "a1.2")], [1, 2, 2]),
        ("invented", [A, B], [1, 2, 7]),
        ("invented", [A, replace(op(2, 2), outcome="fail")], [1, 2]),
        ("forked", [A, op(2, 2, [1, 2], "a1.2"), op(4, 3, [1, 3], "b2.2", client="c2")], [1, 3]),
        ("order", [A, B], [2, 1]),
        ("order", [op(0, None, [1], "a1.1", turn="r1"), op(2, 1, [1, 1], "a1.2")], [1, 1]),
        ("stale", [A, B, op(4, None, [1], "a1.3", turn="r1")], [1, 2]),
        ("versions", [A, op(2, 2, [1, 2], "a1.2", resumed_version=0)], [1, 2]),
        ("versions", [A, op(0.5, 2, [1, 2], "b2.1", client="c2")], [1, 2]),
        ("versions", [op(0, 1, [1], "a2.1"), op(2, 2, [1, 2], "b1.2")], [1, 2]),
        ("versions", [op(0, 1, [1], "a1.5"), op(2, 2, [1, 2], "a1.4")], [1, 2]),
        ("owners", [A, op(2, 2, [1, 2], "b1.2")], [1, 2]),
        ("resent", [A, op(2, 1, [1, 9], "a1.1", replayed=True)], [1]),
        ("resent", [A, op(2, 1, [1], "a1.2")], [1]),
        ("receipt", [A, op(2, 2, [1, 2], "a1.2", resumed_from="new")], [1, 2]),
        ("receipt", [A, op(2, 2, [1, 2], "a1.2", lost=("a file",))], [1, 2]),
        ("receipt", [op(0, 1, [1], "a1.1", resumed_from="blobs")], [1]),
    ],
)
def test_a_bad_history(rule: str, ops: list[Op], final: list[int] | None) -> None:
    assert rule in rules(*ops, final=final)


def test_state_and_sqlite_that_differ() -> None:
    torn = replace(B, reply=json.dumps({"state": [1, 2], "sqlite": [1]}))
    assert rules(A, torn, final=[1, 2]) == {"torn"}


@pytest.mark.parametrize(
    ("why", "records"),
    [
        ("an epoch is skipped", held("a1.0", "a1.1 t1", "a1.2 t2", "b3.2 t2")),
        ("an epoch goes back", held("a2.0", "a1.0", "a1.1 t1", "a1.2 t2")),
        ("two nodes in an epoch", held("a1.0", "a1.1 t1", "a1.2 t2", "b1.2 t2")),
        ("a version is skipped", held("a1.0", "a1.1 t1", "a1.3 t2", "a1.2 t2")),
        ("a move changes the version", held("a1.0", "a1.1 t1", "b2.2 t2")),
        ("a turn was never there", held("a1.0", "a1.1 t1")),
        ("another turn made the version", held("a1.0", "a1.1 t1", "a1.2 t9")),
        ("another node made the version", held("a1.0", "a1.1 t1", "b2.1 t1", "b2.2 t2")),
    ],
)
def test_a_store_that_held_what_it_should_not(why: str, records: list[Held]) -> None:
    assert rules(A, B, final=[1, 2], records=records) == {"store"}, why


def test_a_commit_of_the_past_owner_that_was_let_through() -> None:
    """What a coordinator without a check of epochs does: nothing is lost, and it was still not allowed."""
    records = held("a1.0", "a1.1 t1", "b2.1 t1", "b2.2 t2")
    assert rules(A, B, final=[1, 2], records=records) == {"store"}
    assert rules(A, B, final=[1, 2]) == set(), "clients alone can't see it"
