"""What is said to be lost."""

from __future__ import annotations

import pytest
from hypothesis import given as over
from hypothesis import strategies as st

from edge_agent.losses import Given, lost
from shared.manifest import MAX_TURNS, StateManifest


def found(version: int, first: int = 1) -> StateManifest:
    """A state whose turn t<n> made version n, from `first` on."""
    manifest = StateManifest("t/a/u", 1, version)
    for n in range(first, version + 1):
        manifest = manifest.with_turn(f"t{n}", "reply")
    return manifest


@pytest.mark.parametrize(
    ("given", "state", "said"),
    [
        (None, found(3), []),
        (Given("t3", "n", 3, durable=True), found(3), []),
        (Given("t3", "n", 3, durable=False), found(5), []),
        (
            Given("t5", "n", 5, durable=False),
            found(4),
            ["version 5, which n acknowledged before it was committed"],
        ),
        (
            Given("t6", "n", 6, durable=False),
            found(4),
            ["versions 5 to 6, which n acknowledged before they were committed"],
        ),
        (Given("t2", "n", 2, durable=True), found(0), ["versions 1 to 2, which n acknowledged as committed"]),
        (
            Given("other", "n", 3, durable=False),
            found(4),
            ["version 3, which n acknowledged before it was committed"],
        ),
        (Given("t1", "n", 1, durable=False), found(MAX_TURNS + 1), []),
    ],
)
def test_what_is_lost_is_said(given: Given | None, state: StateManifest, said: list[str]) -> None:
    assert lost(given, state) == said


@over(st.integers(1, 2 * MAX_TURNS), st.integers(0, 2 * MAX_TURNS), st.booleans())
def test_what_is_there_is_never_lost_and_what_is_missing_always(
    version: int, later: int, durable: bool
) -> None:
    given = Given(f"t{version}", "n", version, durable)
    assert lost(given, found(version + later)) == []
    assert lost(given, found(version - 1)) != []
