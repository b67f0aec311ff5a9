"""Entries on their way: whatever they are called, a page of them fits into a frame."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.jail import entries
from edge_agent.jail.wire import MAX_FRAME
from edge_agent.state.files import Entry, Kind

BIG = 2**64 - 1
NAMES = st.text(max_size=40) | st.binary(max_size=40).map(lambda raw: raw.decode("utf-8", "surrogateescape"))


@given(NAMES, NAMES, st.sampled_from(Kind), st.integers(-(2**63), BIG))
def test_an_entry_takes_no_more_than_is_thought(path: str, target: str, kind: Kind, number: int) -> None:
    entry = Entry(path, kind, 0o777, BIG, number, number, BIG, target)
    most = entries._NUMBERS + entries._most_bytes(path) + entries._most_bytes(target)
    assert len(json.dumps(entries.to_list(entry))) <= most
    assert entries.from_list(json.loads(json.dumps(entries.to_list(entry)))) == entry


@pytest.mark.parametrize("name", ["plain", '"\\"', "\x01", "é", "\udcff", "\U0001f600"])
def test_pages_of_long_paths_fit_into_frames(name: str) -> None:
    path = "/".join([(name * 255)[:255]] * 64)
    found = [Entry(path, Kind.LINK, 0o777, target=(name * 4095)[:4095]) for _ in range(20)]
    pages = list(entries.pages(found))
    assert [entries.from_list(values) for page in pages for values in page] == found
    assert all(len(json.dumps({"part": page})) < MAX_FRAME for page in pages)
    assert len(pages) > 1
