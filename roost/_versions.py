"""The versions of one instance's state: reading its past, and adding a version that no turn made.

Always true: nothing that is committed is changed; a new version follows on what was committed when it was
made, or it is refused (STATE_CHANGED) and made anew. The turns that were applied stay applied: whoever sends
one again gets its recorded reply, also after an older state was restored.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

import grpc.aio

from protos.v1 import state_pb2, state_pb2_grpc
from roost._chunks import Chunks
from roost._damage import Doctor
from roost._mesh import Coordinators
from shared.content import Blob
from shared.errors import Reason, RoostError
from shared.identity import InstanceKey
from shared.manifest import FileNode, Node, StateManifest, blobs_of, decode, encode

_SECONDS = 20.0  # for one question
_TRIES = 5
_DAMAGED = frozenset({Reason.BLOB_MISSING, Reason.BLOB_CORRUPT})


@dataclass(frozen=True, slots=True)
class Version:
    """`manifest` is None if it can't be read, which `damage` then explains."""

    number: int
    root: str
    manifest: StateManifest | None
    damage: str = ""


class Versions:
    """Of the instance `key`. AGENT_UNKNOWN if there is no such agent."""

    def __init__(self, coordinators: Coordinators, key: InstanceKey) -> None:
        self._coordinators = coordinators
        self._key = key
        self.chunks = Chunks(coordinators)
        self.doctor = Doctor(coordinators, self.chunks)

    async def head(self) -> state_pb2.HeadReply:
        async def call(channel: grpc.aio.Channel, timeout: float) -> state_pb2.HeadReply:
            request = state_pb2.HeadRequest(key=self._key.to_proto())
            return await state_pb2_grpc.StateStub(channel).Head(request, timeout=timeout)

        return await self._coordinators.ask(call, _SECONDS)

    async def log(self, head: state_pb2.HeadReply) -> list[Version]:
        """What is kept, newest first. A version that can't be read is told as damaged; of what is older than
        that only the present one's parent can still be found."""
        found: list[Version] = []
        following = [(head.version, head.root), (head.version - 1, head.parent)]
        while following and len(found) < head.history:
            number, root = following.pop(0)
            if not root:
                break
            version = await self._read(number, root)
            if version.manifest is None and found and not version.damage:
                break  # no longer kept
            found.append(version)
            if version.manifest is not None:
                following = [(number - 1, version.manifest.parent)]
        return found

    async def find(self, number: int | None) -> tuple[state_pb2.HeadReply, Version]:
        """The version of this number, or the present one. VERSION_GONE, RESTORE_INCOMPLETE."""
        head = await self.head()
        if not head.version:
            raise RoostError(
                Reason.VERSION_GONE,
                f"nothing is committed of {self._key}",
                "an instance comes to be with its first message, or by `roost state import`",
            )
        wanted = head.version if number is None else number
        kept = await self.log(head)
        for version in kept:
            if version.number == wanted:
                return head, version
        numbers = ", ".join(str(version.number) for version in kept)
        raise RoostError(
            Reason.VERSION_GONE,
            f"version {wanted} of {self._key} is not kept; what is: {numbers}",
            "`roost state log` lists them; [state] history in agent.toml says how many there are",
        )

    async def restore(self, number: int) -> tuple[int, int]:
        """Makes the state of that version the present one, as a new version: its number, and its epoch."""

        async def attempt() -> tuple[int, int]:
            head, version = await self.find(number)
            manifest = readable(self._key, version)
            await self._require(manifest)
            return await self._publish(head, manifest.nodes, manifest, f"version {number} was restored")

        return await self._until_unchanged(attempt)

    async def replace(
        self, nodes: Sequence[Node], put: Callable[[set[str]], Awaitable[None]], note: str
    ) -> tuple[int, int]:
        """Makes these files the present state. `put` is told which of their chunks the mesh does not have."""

        async def attempt() -> tuple[int, int]:
            head = await self.head()
            await put(await self.chunks.missing(blobs_of(nodes)))
            return await self._publish(head, nodes, None, note)

        return await self._until_unchanged(attempt)

    # -----------------------------------------------------------------------------------------

    async def _read(self, number: int, root: str) -> Version:
        try:
            manifest = await decode(root, self.chunks.fetch)
        except RoostError as error:
            if error.reason is Reason.BLOB_CORRUPT:
                return Version(number, root, None, error.message)
            if error.reason is Reason.BLOB_MISSING:
                return Version(number, root, None)
            raise
        if manifest.key != str(self._key):
            return Version(number, root, None, f"its manifest is of {manifest.key}")
        return Version(manifest.version, root, manifest)

    async def _require(self, manifest: StateManifest) -> None:
        """Every chunk must be there to be relied on. One that is about to be collected is put again."""
        for hash in sorted(await self.chunks.missing(blobs_of(manifest.nodes))):
            try:
                await self.chunks.put([blob async for blob in self.chunks.get([hash])])
            except RoostError as error:
                if error.reason not in _DAMAGED:
                    raise
                names = [n.path for n in manifest.nodes if isinstance(n, FileNode) and hash in n.chunks]
                raise _incomplete(self._key, manifest.version, f"{names[0]!r}: {error.message}") from error

    async def _publish(
        self, head: state_pb2.HeadReply, nodes: Sequence[Node], base: StateManifest | None, note: str
    ) -> tuple[int, int]:
        manifest = StateManifest(
            str(self._key),
            head.epoch + 1,
            head.version + 1,
            tuple(nodes),
            parent=head.root,
            made_ms=time.time_ns() // 1_000_000,
            note=note,
        )
        if head.version:
            present = (await self._read(head.version, head.root)).manifest or base
            manifest = replace(manifest, turns=present.turns if present else ())
        encoded = await asyncio.to_thread(encode, manifest)
        await self.chunks.put(Blob.of(plain) for plain in encoded.blobs.values())
        request = state_pb2.PublishRequest(
            key=self._key.to_proto(),
            version=manifest.version,
            root=encoded.root,
            why=note,
            gc_round=head.gc_round,
        )

        async def call(channel: grpc.aio.Channel, timeout: float) -> state_pb2.PublishReply:
            return await state_pb2_grpc.StateStub(channel).Publish(request, timeout=timeout)

        return manifest.version, (await self._coordinators.ask(call, _SECONDS)).epoch

    async def _until_unchanged(self, attempt: Callable[[], Awaitable[tuple[int, int]]]) -> tuple[int, int]:
        """A turn that is committed meanwhile comes first: its version is then the parent."""
        for _ in range(_TRIES - 1):
            try:
                return await attempt()
            except RoostError as error:
                if error.reason not in (Reason.STATE_CHANGED, Reason.UPLOAD_STALE):
                    raise
        return await attempt()


def readable(key: InstanceKey, version: Version) -> StateManifest:
    """RESTORE_INCOMPLETE if it is not."""
    if version.manifest is None:
        raise _incomplete(key, version.number, version.damage or "its manifest is not in the blob store")
    return version.manifest


def _incomplete(key: InstanceKey, version: int, why: str) -> RoostError:
    return RoostError(
        Reason.RESTORE_INCOMPLETE,
        f"version {version} of {key} is not complete: {why}",
        "`roost state repair` looks for what is missing on the nodes; another version may be whole",
    )
