from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.state import tree
from shared import manifest
from shared.content import MAX_BLOB, hash_of
from shared.errors import Reason, RoostError
from shared.manifest import (
    MAX_REPLIES,
    MAX_TURNS,
    DirNode,
    Encoded,
    FileNode,
    LinkNode,
    Node,
    StateManifest,
    TurnRecord,
    blobs_of,
    decode,
    decode_tree,
    encode,
    encode_tree,
    parts_of,
)

H = "ab" * 32


async def read_back(encoded: Encoded) -> StateManifest:
    return await decode(encoded.root, _from(encoded.blobs))


def _from(blobs: dict[str, bytes]) -> manifest.Fetch:
    async def fetch(hashes: Sequence[str]) -> dict[str, bytes]:
        return {hash: blobs[hash] for hash in hashes if hash in blobs}

    return fetch


def canonical(document: Any) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


NAMES = st.binary(min_size=1, max_size=12).map(lambda b: b.replace(b"/", b"_").replace(b"\0", b"_"))
PATHS = (
    NAMES.filter(lambda b: b not in (b".", b".."))
    .map(lambda b: b.decode("utf-8", "surrogateescape"))
    .filter(lambda s: not s.startswith(manifest.RESERVED_NAME))
)
MODES = st.integers(0, 0o777)


def _file(path: str) -> st.SearchStrategy[Node]:
    return st.builds(
        lambda mode, mtime, chunks, extra: FileNode(path, mode, mtime, len(chunks) * (1 + extra), chunks),
        MODES,
        st.integers(-(2**63) + 1, 2**63 - 1),
        st.lists(st.binary(max_size=2).map(hash_of), max_size=3).map(tuple),
        st.integers(0, MAX_BLOB - 1),
    )


@st.composite
def nodes(draw: st.DrawFn, prefix: str = "", depth: int = 0) -> tuple[Node, ...]:
    found: list[Node] = []
    for name in draw(st.lists(PATHS, max_size=4, unique=True)):
        path = prefix + name
        match draw(st.integers(0, 2 if depth < 3 else 1)):
            case 0:
                found.append(draw(_file(path)))
            case 1:
                found.append(LinkNode(path, draw(PATHS)))
            case _:
                found.append(DirNode(path, draw(MODES)))
                found += draw(nodes(path + "/", depth + 1))
    return tuple(sorted(found, key=lambda node: node.path))


TURNS = st.lists(
    st.builds(TurnRecord, st.text(min_size=1, max_size=8), st.none() | st.text(max_size=20)), max_size=4
).map(tuple)


ORIGINS = st.tuples(
    st.just("") | st.binary(max_size=2).map(hash_of), st.integers(0, 2**63 - 1), st.text(), st.text()
)


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), nodes(), TURNS, ORIGINS)
async def test_a_manifest_reads_back_as_it_was(
    epoch: int,
    version: int,
    nodes: tuple[Node, ...],
    turns: tuple[TurnRecord, ...],
    origin: tuple[str, int, str, str],
) -> None:
    state = StateManifest("t/a/u", epoch, version, nodes, turns, *origin)
    assert await read_back(encode(state)) == state
    tree = encode_tree(nodes)
    assert await decode_tree(tree.root, _from(tree.blobs)) == nodes


def large(count: int = 5000) -> StateManifest:
    return StateManifest(
        "t/a/u",
        1,
        2,
        tuple(FileNode(f"f{i:06}", 0o600, i, 10, (hash_of(str(i).encode()),)) for i in range(count)),
    )


async def test_a_large_manifest_is_cut_up_and_shares_what_is_equal() -> None:
    first = encode(large())
    assert len(first.blobs) > 5
    assert all(len(blob) <= MAX_BLOB for blob in first.blobs.values())
    assert await read_back(first) == large()
    second = encode(large().with_turn("turn", "reply"))
    assert len(second.blobs.keys() - first.blobs.keys()) <= 3
    assert len(blobs_of(large().nodes)) == 5000


def plain_of(encoded: Encoded) -> bytes:
    root = encoded.blobs[encoded.root]
    if not parts_of(root):
        return root.removeprefix(b'{"inline":').removesuffix(b"}")
    assert parts_of(root) == encoded.blobs.keys() - {encoded.root}
    return b"".join(encoded.blobs[part] for part in json.loads(root)["parts"])


@given(nodes(), TURNS, ORIGINS)
def test_the_encoding_is_canonical_json_of_what_the_manifest_says(
    nodes: tuple[Node, ...], turns: tuple[TurnRecord, ...], origin: tuple[str, int, str, str]
) -> None:
    parent, made_ms, node, note = origin
    told = document(
        nodes=[as_list(node) for node in nodes],
        turns=[[turn.id, turn.reply] for turn in turns],
        **{"parent": parent, "made_ms": made_ms, "node": node, "note": note},
    )
    state = StateManifest("t/a/u", 1, 1, nodes, turns, *origin)
    assert plain_of(encode(state)) == canonical(told)
    assert plain_of(encode_tree(nodes)) == canonical({"format": 1, "nodes": told["nodes"]})


def as_list(node: Node) -> list[Any]:
    match node:
        case FileNode():
            return file(node.path, node.mode, node.mtime_ns, node.size, node.chunks)
        case DirNode():
            return ["dir", node.path, node.mode]
        case LinkNode():
            return ["link", node.path, node.target]


async def test_no_name_is_taken_for_what_is_around_it() -> None:
    name = '"nodes":['
    state = StateManifest(name, 1, 1, (LinkNode(name, name),), (TurnRecord(name, name),), "", 0, name, name)
    assert await read_back(encode(state)) == state


def test_an_encoding_that_is_cut_up_is_the_same_json() -> None:
    state = large()
    told = document(version=2, nodes=[as_list(node) for node in state.nodes])
    assert plain_of(encode(state)) == canonical(told)


# --- made from one that is sound ---------------------------------------------------------------


@given(nodes(), nodes(), TURNS, TURNS, st.data())
def test_what_it_was_made_from_changes_nothing_in_an_encoding(
    before: tuple[Node, ...],
    other: tuple[Node, ...],
    turns: tuple[TurnRecord, ...],
    more: tuple[TurnRecord, ...],
    data: st.DataObject,
) -> None:
    base = StateManifest("t/a/u", 1, 1, before, turns)
    top = {node.path.partition("/")[0] for node in (*before, *other)}
    kept = {name for name in top if data.draw(st.booleans())}
    merged = [node for node in before if node.path.partition("/")[0] in kept]
    merged += [node for node in other if node.path.partition("/")[0] not in kept]
    nodes = tuple(sorted(merged, key=lambda node: node.path))
    state = StateManifest("t/a/u", 1, 2, nodes, (*turns, *more), H)
    assert encode(state, base) == encode(state)


GOOD = (DirNode("d", 0o700), FileNode("d/f", 0o600, 1, 1, (H,)), FileNode("g", 0o600, 1, 1, (H,)))
ONCE = TurnRecord("once", "")


@pytest.mark.parametrize(
    ("nodes", "turns"),
    [
        ((*GOOD[:2], FileNode("g", 0o600, 1, 1, ("x",))), ()),
        ((*GOOD[:2], FileNode("g", 0o4755, 1, 1, (H,))), ()),
        ((*GOOD, FileNode("h\0", 0o600, 1, 1, (H,))), ()),
        ((GOOD[0], GOOD[2], GOOD[1]), ()),
        (GOOD[1:], ()),
        ((LinkNode("d", "/etc"), GOOD[1]), ()),
        ((GOOD[2], GOOD[2]), ()),
        (GOOD, (ONCE, TurnRecord("", None))),
        (GOOD, (ONCE, TurnRecord("once", 5))),  # type: ignore[arg-type]
        (GOOD, (ONCE,) * (MAX_TURNS + 1)),
    ],
    ids=str,
)
def test_what_is_new_is_checked_and_how_it_goes_with_the_rest(
    nodes: tuple[Node, ...], turns: tuple[TurnRecord, ...]
) -> None:
    base = StateManifest("t/a/u", 1, 1, GOOD, (ONCE,))
    encode(base)
    with pytest.raises(ValueError):
        encode(StateManifest("t/a/u", 1, 2, nodes, turns), base)


@pytest.mark.parametrize("harm", ["lost", "flipped", "cut short"])
async def test_a_damaged_part_is_corrupt(harm: str) -> None:
    encoded = encode(large())
    for hash in encoded.blobs:
        blobs = dict(encoded.blobs)
        match harm:
            case "lost":
                del blobs[hash]
            case "flipped":
                blobs[hash] = blobs[hash].replace(b"0", b"1", 1)
            case "cut short":
                blobs[hash] = blobs[hash][:-1]
        await _refused(encoded.root, blobs)


async def _refused(root: str, blobs: dict[str, bytes]) -> None:
    with pytest.raises(RoostError) as caught:
        await decode(root, _from(blobs))
    assert caught.value.reason is Reason.BLOB_CORRUPT


def document(**changes: Any) -> dict[str, Any]:
    origin = {"parent": "", "made_ms": 0, "node": "", "note": ""}
    return OLD | {"format": 2} | origin | changes


OLD = {"format": 1, "key": "t/a/u", "epoch": 1, "version": 1, "nodes": [], "turns": []}


def file(path: str = "a", mode: Any = 0, mtime: Any = 0, size: Any = 1, chunks: Any = (H,)) -> list[Any]:
    return ["file", path, mode, mtime, size, list(chunks)]


BAD_PATHS = [
    "",
    "/a",
    "a/",
    "..",
    ".",
    "a/../b",
    "a//b",
    "a\0",
    "x" * 256,
    "\ud800",
    "\udcc3\udca9",  # é, spelled as bytes that were not UTF-8: a second name for one file
    ".roost-tmp-x",
    "/".join("a" * 65),
]
BAD = [
    [],
    None,
    {},
    document(format=3),
    document(format=1),
    OLD | {"format": 2},
    document(parent="x"),
    document(parent=H.upper()),
    document(parent=None),
    document(made_ms=-1),
    document(made_ms=True),
    document(node=1),
    document(note="x" * 600),
    document(extra=1),
    document(epoch=-1),
    document(version=1 << 64),
    document(version=True),
    document(key=1),
    document(key="x" * 600),
    document(nodes={}),
    document(turns=[["id"]]),
    document(turns=[["", None]]),
    document(turns=[["id", 5]]),
    document(turns=[["x", None]] * (MAX_TURNS + 1)),
    *(document(nodes=[file(path)]) for path in BAD_PATHS),
    *(document(nodes=[["link", path, "x"]]) for path in BAD_PATHS),
    document(nodes=[["link", "a", ""]]),
    document(nodes=[["link", "a", "x\0"]]),
    document(nodes=[["link", "a", "x" * 5000]]),
    document(nodes=[["pipe", "a"]]),
    document(nodes=[file("b"), file("a")]),
    document(nodes=[file("a"), file("a")]),
    document(nodes=[file("a/b")]),
    document(nodes=[file("a"), file("a/b")]),
    document(nodes=[["link", "a", "/etc"], file("a/passwd")]),
    document(nodes=[file(mode=0o4755)]),
    document(nodes=[file(mode=-1)]),
    document(nodes=[file(mode=True)]),
    document(nodes=[file(mode=1.0)]),
    document(nodes=[file(size=-1)]),
    document(nodes=[file(size=0)]),
    document(nodes=[file(size=MAX_BLOB + 1)]),
    document(nodes=[file(size=1 << 60)]),
    document(nodes=[file(chunks=())]),
    document(nodes=[file(chunks=("../../etc/passwd",))]),
    document(nodes=[file(chunks=(5,))]),
    document(nodes=[file(mtime=1 << 70)]),
]


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: str(bad)[:60].encode("ascii", "replace").decode())
async def test_a_forged_manifest_is_refused(bad: Any) -> None:
    plain = canonical({"inline": bad})
    await _refused(hash_of(plain), {hash_of(plain): plain})


async def test_one_of_the_first_format_is_still_read() -> None:
    plain = canonical({"inline": OLD})
    state = await decode(hash_of(plain), _from({hash_of(plain): plain}))
    assert state == StateManifest("t/a/u", 1, 1)


@pytest.mark.parametrize(
    "plain",
    [
        b"",
        b"{",
        b"[" * 100_000,
        b'{"inline": 1}',
        b'{"inline":{},"inline":{}}',
        b"9" * 10_000,
        b"NaN",
        b'{"parts":[]}',
        b'{"parts":["x"]}',
        b'{"parts":7}',
        canonical({"parts": [H] * 5000}),
        canonical({"parts": [], "inline": {}}),
    ],
    ids=lambda plain: str(plain[:30]),
)
async def test_a_forged_root_is_refused(plain: bytes) -> None:
    await _refused(hash_of(plain), {hash_of(plain): plain})


async def test_parts_that_together_are_too_large_are_refused() -> None:
    part = bytes(MAX_BLOB)
    root = canonical({"parts": [hash_of(part)] * 100})
    await _refused(hash_of(root), {hash_of(root): root, hash_of(part): part})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(["file", "dir", H]),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=12,
)


@given(st.lists(st.lists(JSON, max_size=6), max_size=3), st.lists(JSON, max_size=3))
async def test_whatever_is_in_a_manifest_is_refused_or_sound(nodes: list[Any], turns: list[Any]) -> None:
    plain = canonical({"inline": document(nodes=nodes, turns=turns)})
    try:
        state = await decode(hash_of(plain), _from({hash_of(plain): plain}))
    except RoostError as error:
        assert error.reason is Reason.BLOB_CORRUPT
    else:
        assert encode(state).root == hash_of(plain)


def test_what_could_not_be_read_back_is_not_written() -> None:
    with pytest.raises(ValueError):
        encode(StateManifest("t/a/u", 1, 1, (FileNode("../a", 0, 0, 0, ()),)))


def test_the_limits_of_trees_and_manifests_agree() -> None:
    assert tree.MAX_ENTRIES == manifest.MAX_NODES
    assert tree.MAX_DEPTH == manifest.MAX_DEPTH
    assert tree.TEMPORARY == manifest.RESERVED_NAME


# --- turns -----------------------------------------------------------------------------------


def test_the_ids_of_the_last_turns_are_kept() -> None:
    state = StateManifest("t/a/u", 1, 1)
    for i in range(MAX_TURNS + 10):
        state = state.with_turn(f"turn-{i}", f"reply {i}")
    assert len(state.turns) == MAX_TURNS
    assert state.turn("turn-9") is None
    assert state.turn("turn-10") == TurnRecord("turn-10", "reply 10")
    assert state.turns[-1].id == f"turn-{MAX_TURNS + 9}"


def test_replies_are_dropped_oldest_first_and_the_newest_never() -> None:
    third = "é" * (MAX_REPLIES // 6)
    state = StateManifest("t/a/u", 1, 1)
    for i in range(5):
        state = state.with_turn(str(i), third)
    assert [turn.reply is not None for turn in state.turns] == [False, False, True, True, True]
    state = state.with_turn("huge", "x" * (MAX_REPLIES + 1))
    assert [turn.reply is not None for turn in state.turns] == [False] * 5 + [True]
    assert state.turn("4") == TurnRecord("4", None)


@pytest.mark.parametrize("turn_id", ["", "x" * 257])
def test_a_turn_id_that_could_not_be_kept_is_refused(turn_id: str) -> None:
    with pytest.raises(RoostError) as caught:
        StateManifest("t/a/u", 1, 1).with_turn(turn_id, "")
    assert caught.value.reason is Reason.BAD_REQUEST
