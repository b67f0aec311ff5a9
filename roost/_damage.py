"""What is damaged of a version, and how it is made whole again from the copies that nodes have.

Always true: nothing is guessed. A blob is whole if its bytes match its name, wherever they came from; a
version is whole if all of its blobs are. What no node has stays damaged, and is named.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Collection
from dataclasses import dataclass

import grpc.aio

from protos.v1 import state_pb2, state_pb2_grpc
from roost._chunks import Chunks
from roost._mesh import Coordinators
from shared.content import is_hash
from shared.errors import Reason, RoostError
from shared.manifest import FileNode, blobs_of, decode

_SECONDS = 20.0  # for one question
_AT_ONCE = 1000  # hashes that are asked of nodes
_WAIT = 15.0  # seconds for nodes to put what they have, if nothing more arrives
_LOOK_EVERY = 0.3


@dataclass(frozen=True, slots=True)
class Damage:
    """`what`: "missing" or "corrupt". `of`: the files that need the blob, or the list of files itself."""

    hash: str
    what: str
    of: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Checked:
    blobs: int
    damage: tuple[Damage, ...]


class Doctor:
    def __init__(self, coordinators: Coordinators, chunks: Chunks) -> None:
        self._coordinators = coordinators
        self._chunks = chunks

    async def check(self, root: str) -> Checked:
        """All blobs of the version whose manifest is `root`. If its list of files is damaged, only that is
        looked at."""
        own = await self._of_manifest(root)
        if bad := await self._chunks.damaged(own):
            damage = (Damage(hash, what, ("its list of files",)) for hash, what in sorted(bad.items()))
            return Checked(len(own), tuple(damage))
        manifest = await decode(root, self._chunks.fetch)
        hashes = blobs_of(manifest.nodes)
        bad = await self._chunks.damaged(hashes)
        files: dict[str, list[str]] = {hash: [] for hash in bad}
        for node in manifest.nodes:
            for hash in set(node.chunks) & bad.keys() if isinstance(node, FileNode) else ():
                files[hash].append(node.path)
        found = (Damage(hash, what, tuple(files[hash])) for hash, what in sorted(bad.items()))
        return Checked(len(own) + len(hashes), tuple(found))

    async def repair(self, root: str) -> tuple[int, Checked]:
        """Asks the nodes for what is damaged, until all is whole or they have no more: how many blobs were
        brought back, and what is left."""
        repaired = 0
        while True:  # the list of files first: only then is it known what else there is
            checked = await self.check(root)
            left = await self._salvage({damage.hash for damage in checked.damage})
            repaired += len(checked.damage) - len(left)
            if len(left) == len(checked.damage):
                return repaired, checked

    async def _of_manifest(self, root: str) -> list[str]:
        """The blobs that the manifest itself is in, as far as is known."""
        try:
            top = json.loads((await self._chunks.fetch([root]))[root])
        except RoostError as error:
            if error.reason not in (Reason.BLOB_MISSING, Reason.BLOB_CORRUPT):
                raise
            return [root]
        parts = top.get("parts", []) if isinstance(top, dict) else []
        return [root, *(part for part in parts if is_hash(part))]

    async def _salvage(self, hashes: Collection[str]) -> set[str]:
        """Those that no node has."""
        left = set(hashes)
        loop = asyncio.get_running_loop()
        for start in range(0, len(left), _AT_ONCE):
            await self._ask(sorted(hashes)[start : start + _AT_ONCE])
        deadline = loop.time() + _WAIT
        while left and loop.time() < deadline:
            now = set(await self._chunks.damaged(left))
            if len(now) < len(left):
                deadline = loop.time() + _WAIT
            left = now
            await asyncio.sleep(_LOOK_EVERY)
        return left

    async def _ask(self, hashes: list[str]) -> None:
        async def call(channel: grpc.aio.Channel, timeout: float) -> state_pb2.SalvageAnswer:
            request = state_pb2.SalvageRequest(hashes=hashes)
            return await state_pb2_grpc.StateStub(channel).Salvage(request, timeout=timeout)

        await self._coordinators.ask(call, _SECONDS)
