"""Manifests: what a tree of files is, as a value that is itself stored as blobs.

A manifest's plain encoding is canonical JSON. Its root blob holds it inline, or lists the blobs that it was
cut into. What must hold: equal manifests have equal roots, and what `decode` returns is fit to be acted
upon, whoever made the blobs: paths stay in the tree, parents are directories, sizes are sane. `encode`
checks the same, so that it makes nothing that can't be read back; but not again what it takes over from a
manifest that was. How it can fail: BLOB_CORRUPT, and what `fetch` raises.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar, assert_never

from shared.content import MAX_BLOB, chunks_of_bytes, hash_of, is_hash
from shared.errors import Reason, RoostError

FORMAT = 2  # of an instance's state; 1, which did not know of its parent, is still read
TREE_FORMAT = 1
MAX_NODES = 100_000
MAX_DEPTH = 64
MAX_FILE = 1 << 44  # bytes
MAX_TIME = (1 << 63) - 1  # ns before or after 1970
MAX_TURNS = 128  # turns whose ids are kept
MAX_REPLIES = 256 << 10  # bytes of kept replies together; the newest is kept whatever its size
MAX_TURN_ID = 256  # characters
MAX_NOTE = 512  # characters
RESERVED_NAME = ".roost-tmp-"  # no name begins so: it marks unfinished writes

_INLINE = 32 << 10  # bytes; a larger encoding is cut up, so that two versions share what is equal
_MAX_ENCODING = 64 << 20  # bytes
_MAX_PARTS = 4096
_PARTS_AT_ONCE = 16

Fetch = Callable[[Sequence[str]], Awaitable[dict[str, bytes]]]


@dataclass(frozen=True, slots=True)
class FileNode:
    """`path` as in Entry: relative, `/` between parts, not-UTF-8 bytes by surrogateescape."""

    path: str
    mode: int  # permission bits
    mtime_ns: int
    size: int  # bytes
    chunks: tuple[str, ...]  # hashes, in the order of the content


@dataclass(frozen=True, slots=True)
class DirNode:
    path: str
    mode: int


@dataclass(frozen=True, slots=True)
class LinkNode:
    path: str
    target: str


Node = FileNode | DirNode | LinkNode


@dataclass(frozen=True, slots=True)
class TurnRecord:
    """An applied turn. `reply` is None when it is too old to be kept."""

    id: str
    reply: str | None


@dataclass(frozen=True, slots=True)
class StateManifest:
    """One version of one instance's state, with the turns that made it, oldest first.

    `parent` is the root of the version that this one was made from; empty: the first, or not known. When and
    where it was made (milliseconds since 1970; a node, or a note of what else made it) is for people: nothing
    is decided by it.
    """

    key: str  # tenant/agent/user
    epoch: int
    version: int
    nodes: tuple[Node, ...] = ()  # sorted by path, parents before children
    turns: tuple[TurnRecord, ...] = ()
    parent: str = ""
    made_ms: int = 0
    node: str = ""
    note: str = ""

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(node.size for node in self.nodes if isinstance(node, FileNode))

    def turn(self, turn_id: str) -> TurnRecord | None:
        """The record of this turn, if it was applied and is among those kept."""
        return next((turn for turn in reversed(self.turns) if turn.id == turn_id), None)

    def with_turn(self, turn_id: str, reply: str) -> StateManifest:
        """The same with one more turn. Drops what is beyond MAX_TURNS and MAX_REPLIES, oldest first."""
        if not 1 <= len(turn_id) <= MAX_TURN_ID:
            raise RoostError(
                Reason.BAD_REQUEST, f"a turn's id has 1 to {MAX_TURN_ID} characters, not {len(turn_id)}"
            )
        turns = [TurnRecord(turn_id, reply)]
        left = MAX_REPLIES - _reply_bytes(reply)
        for turn in reversed(self.turns[-(MAX_TURNS - 1) :]):
            left -= _reply_bytes(turn.reply)
            # Once one did not fit, no older one is kept: which are there is then easy to explain.
            turns.append(turn if left >= 0 else TurnRecord(turn.id, None))
        return replace(self, turns=tuple(reversed(turns)))


@dataclass(frozen=True, slots=True)
class Encoded:
    """A manifest as blobs: hash to plain bytes. `root` is one of them."""

    root: str
    blobs: dict[str, bytes]


def blobs_of(nodes: Iterable[Node]) -> set[str]:
    """The hashes of all chunks of all files."""
    return {chunk for node in nodes if isinstance(node, FileNode) for chunk in node.chunks}


def encode(manifest: StateManifest, base: StateManifest | None = None) -> Encoded:
    """ValueError for a manifest that `decode` would refuse: the caller's bug. `base`: one that was encoded or
    decoded before; nodes that are equal in both, and turns that are the same, are not checked again."""
    sound = {node.path: node for node in base.nodes} if base else {}
    known = {turn.id: turn for turn in base.turns} if base else {}
    _require(len(manifest.turns) <= MAX_TURNS, "too many turns")
    _to_state(_from_state(manifest, [turn for turn in manifest.turns if known.get(turn.id) is not turn]))
    _check_nodes(node for node in manifest.nodes if sound.get(node.path) != node)
    _check_tree(manifest.nodes)
    return _encode(_from_state(manifest, manifest.turns), manifest.nodes)


async def decode(root: str, fetch: Fetch) -> StateManifest:
    """The manifest whose root blob is `root`. `fetch` gives plain blobs by hash."""
    return await _decode(root, fetch, _to_state)


def encode_tree(nodes: Sequence[Node]) -> Encoded:
    """A bare tree, such as an agent's files."""
    _check_nodes(nodes)
    _check_tree(nodes)
    return _encode({"format": TREE_FORMAT, "nodes": []}, nodes)


async def decode_tree(root: str, fetch: Fetch) -> tuple[Node, ...]:
    return await _decode(root, fetch, _to_tree)


def parts_of(root: bytes) -> set[str]:
    """What an encoding was cut into, by its root blob: hashes; none if it was not. For a manifest that was
    encoded or decoded before."""
    return set(json.loads(root)["parts"]) if root.startswith(b'{"parts":') else set()


# --- blobs -----------------------------------------------------------------------------------

T = TypeVar("T")


def _encode(document: dict[str, Any], nodes: Sequence[Node]) -> Encoded:
    """Of a document without nodes, with these, which are sound."""
    # In a string that somebody chose the quotes would be escaped.
    head, mark, tail = _canonical(document).partition(b'"nodes":[')
    plain = b"".join((head, mark, ",".join(map(_text_of, nodes)).encode(), tail))
    if len(plain) > _MAX_ENCODING:
        raise RoostError(
            Reason.STATE_TOO_LARGE,
            f"the list of files alone is {len(plain) >> 20} MiB",
            "keep fewer or smaller files",
        )
    if len(plain) <= _INLINE:
        root = b'{"inline":%b}' % plain
        parts = []
    else:
        parts = [(hash_of(part), part) for part in chunks_of_bytes(plain)]
        root = _canonical({"parts": [hash for hash, _ in parts]})
    name = hash_of(root)
    return Encoded(name, {**dict(parts), name: root})


async def _decode(root: str, fetch: Fetch, read: Callable[[Any], T]) -> T:
    top = _parse((await _fetch([root], fetch))[0], root)
    try:
        match top:
            case {"inline": document, **others} if not others:
                return read(document)
            case {"parts": [*parts], **others} if not others and all(map(is_hash, parts)):
                _require(len(parts) <= _MAX_PARTS, "too many parts")
                plain = await _join(parts, fetch)
                # It may be large: the loop must go on meanwhile.
                return await asyncio.to_thread(lambda: read(_parse(plain, root)))
            case _:
                raise ValueError("neither inline nor a list of parts")  # noqa: TRY301
    except ValueError as error:
        raise _corrupt(root, str(error)) from error


async def _join(parts: list[str], fetch: Fetch) -> bytes:
    pieces: list[bytes] = []
    left = _MAX_ENCODING
    for start in range(0, len(parts), _PARTS_AT_ONCE):  # a forged list must not fill the memory
        for piece in await _fetch(parts[start : start + _PARTS_AT_ONCE], fetch):
            pieces.append(piece)
            left -= len(piece)
        _require(left >= 0, "too large")
    return b"".join(pieces)


async def _fetch(hashes: list[str], fetch: Fetch) -> list[bytes]:
    found = await fetch(hashes)
    for hash in hashes:
        plain = found.get(hash)
        if plain is None or len(plain) > MAX_BLOB or hash_of(plain) != hash:
            raise _corrupt(hash, "its bytes are missing or not what its name says")
    return [found[hash] for hash in hashes]


def _canonical(document: object) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def _parse(plain: bytes, root: str) -> Any:
    try:
        document = json.loads(plain)
        # Only what we would have written: no duplicate keys, no second spelling of the same manifest.
        _require(_canonical(document) == plain, "not in canonical form")
    except (ValueError, RecursionError) as error:
        raise _corrupt(root, str(error)) from error
    return document


def _corrupt(hash: str, why: str) -> RoostError:
    return RoostError(
        Reason.BLOB_CORRUPT,
        f"manifest {hash[:12]} can't be used: {why}",
        "the copy was damaged or forged; the original may still be elsewhere",
    )


# --- documents -------------------------------------------------------------------------------


def _from_state(manifest: StateManifest, turns: Iterable[TurnRecord]) -> dict[str, Any]:
    """With these of its turns, and none of its nodes."""
    return {
        "format": FORMAT,
        "key": manifest.key,
        "epoch": manifest.epoch,
        "version": manifest.version,
        "nodes": [],
        "turns": [[turn.id, turn.reply] for turn in turns],
        "parent": manifest.parent,
        "made_ms": manifest.made_ms,
        "node": manifest.node,
        "note": manifest.note,
    }


def _to_state(document: Any) -> StateManifest:
    match document:
        case {
            "format": int(form),
            "key": str(key),
            "epoch": int(epoch),
            "version": int(version),
            "nodes": [*nodes],
            "turns": [*turns],
            **others,
        }:
            _require(form in (1, FORMAT), f"not of format {FORMAT}")
            _require(len(key) <= 512, "its key is too long")
            _require(
                _is_number(epoch, 0, 1 << 64) and _is_number(version, 0, 1 << 64), "bad epoch or version"
            )
            _require(len(turns) <= MAX_TURNS, "too many turns")
            origin = _to_origin(others, form)
            return StateManifest(key, epoch, version, _to_nodes(nodes), tuple(map(_to_turn, turns)), *origin)
        case _:
            raise ValueError("no manifest of an instance's state")


def _to_origin(document: dict[Any, Any], form: int) -> tuple[str, int, str, str]:
    match document:
        case {} if form == 1 and not document:
            return "", 0, "", ""
        case {
            "parent": str(parent),
            "made_ms": int(made_ms),
            "node": str(node),
            "note": str(note),
            **others,
        } if form == FORMAT and not others:
            _require(not parent or is_hash(parent), "its parent's name is no hash")
            _require(_is_number(made_ms, 0, 1 << 63), "its time is out of range")
            _require(len(node) <= MAX_NOTE and len(note) <= MAX_NOTE, "its node or note is too long")
            return parent, made_ms, node, note
        case _:
            raise ValueError(f"not of format {FORMAT}")


def _to_tree(document: Any) -> tuple[Node, ...]:
    match document:
        case {"format": int(form), "nodes": [*nodes], **others} if not others and form == TREE_FORMAT:
            return _to_nodes(nodes)
        case _:
            raise ValueError("no manifest of a tree")


def _to_turn(record: Any) -> TurnRecord:
    match record:
        case [str(id), (str() | None) as reply] if 1 <= len(id) <= MAX_TURN_ID:
            return TurnRecord(id, reply)
        case _:
            raise ValueError("a turn's record is malformed")


def _from_node(node: Node) -> list[Any]:
    match node:
        case FileNode(path, mode, mtime_ns, size, chunks):
            return ["file", path, mode, mtime_ns, size, list(chunks)]
        case DirNode(path, mode):
            return ["dir", path, mode]
        case LinkNode(path, target):
            return ["link", path, target]
        case _:
            assert_never(node)


def _text_of(node: Node) -> str:
    """Its canonical encoding. Nodes are most of a manifest: without a list and an encoder for each this takes
    a quarter of the time."""
    if isinstance(node, FileNode):
        chunks = '"' + '","'.join(node.chunks) + '"' if node.chunks else ""
        return f'["file",{json.dumps(node.path)},{node.mode:d},{node.mtime_ns:d},{node.size:d},[{chunks}]]'
    return _canonical(_from_node(node)).decode()


def _to_nodes(documents: list[Any]) -> tuple[Node, ...]:
    _require(len(documents) <= MAX_NODES, f"more than {MAX_NODES:,} files")
    nodes = tuple(map(_to_node, documents))
    _check_tree(nodes)
    return nodes


def _check_nodes(nodes: Iterable[Node]) -> None:
    for node in nodes:
        _to_node(_from_node(node))


def _check_tree(nodes: Sequence[Node]) -> None:
    """Of nodes that are sound each by itself."""
    _require(len(nodes) <= MAX_NODES, f"more than {MAX_NODES:,} files")
    directories = {""}
    before = ""
    for node in nodes:
        if node.path <= before:
            raise ValueError(f"{node.path!r} is out of order")
        if node.path.rpartition("/")[0] not in directories:
            raise ValueError(f"{node.path!r} is in no directory")
        before = node.path
        if isinstance(node, DirNode):
            directories.add(node.path)


def _to_node(document: Any) -> Node:
    match document:
        case ["file", str(path), int(mode), int(mtime_ns), int(size), [*chunks]]:
            _require(_is_path(path) and _is_mode(mode), f"{path!r} is no file's path or mode")
            _require(_is_number(mtime_ns, -MAX_TIME, MAX_TIME + 1), f"{path!r}: its time is out of range")
            _require(_is_number(size, 0, MAX_FILE), f"{path!r}: its size is out of range")
            _require(all(map(is_hash, chunks)), f"{path!r}: a chunk's name is no hash")
            _require(len(chunks) <= size <= len(chunks) * MAX_BLOB, f"{path!r}: its chunks can't be its size")
            return FileNode(path, mode, mtime_ns, size, tuple(chunks))
        case ["dir", str(path), int(mode)] if _is_path(path) and _is_mode(mode):
            return DirNode(path, mode)
        case ["link", str(path), str(target)] if _is_path(path) and _is_name(target, 4095):
            return LinkNode(path, target)
        case _:
            raise ValueError("an entry is malformed")


def _is_path(path: str) -> bool:
    parts = path.split("/")
    return len(parts) <= MAX_DEPTH and all(
        part not in (".", "..") and _is_name(part, 255) and not part.startswith(RESERVED_NAME)
        for part in parts
    )


def _is_name(text: str, limit: int) -> bool:
    """1 to `limit` bytes that a kernel accepts, in their one spelling."""
    try:
        raw = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return 1 <= len(raw) <= limit and b"\0" not in raw and raw.decode("utf-8", "surrogateescape") == text


def _is_mode(mode: int) -> bool:
    return _is_number(mode, 0, 0o1000)


def _is_number(value: int, low: int, end: int) -> bool:
    return type(value) is int and low <= value < end  # true and false are ints, but no numbers


def _reply_bytes(reply: str | None) -> int:
    return 0 if reply is None else len(reply.encode("utf-8", "surrogatepass"))


def _require(condition: bool, why: str) -> None:
    if not condition:
        raise ValueError(why)
