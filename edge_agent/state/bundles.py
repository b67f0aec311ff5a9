"""Agents' files on this node: one directory a version, made once, read by every jail of that version."""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from edge_agent.state.blobs import Blobs
from edge_agent.state.chunks import ChunkStore
from edge_agent.state.local_files import LocalFiles
from edge_agent.state.restore import restore
from edge_agent.state.source import Source
from shared.errors import Reason, RoostError
from shared.manifest import DirNode, FileNode, Node, decode_tree

_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_HALF_MADE = ".half-made-"


class BundleStore:
    """Bundles under `directory`, which is made if need be; what a crash left half-made in it is removed.

    What must hold: `directory/<version>` is complete whenever it exists, since it is made under another
    name, synced and renamed. `timeout` in seconds bounds the making of one.
    """

    def __init__(self, directory: Path, chunks: ChunkStore, blobs: Blobs, timeout: float = 600.0) -> None:
        self._directory = directory
        self._chunks = chunks
        self._blobs = blobs
        self._timeout = timeout
        self._making: dict[str, asyncio.Task[None]] = {}
        directory.mkdir(parents=True, exist_ok=True)
        for path in directory.glob(f"{_HALF_MADE}*"):
            shutil.rmtree(path)

    def path(self, version: str) -> Path:
        return self._directory / version

    def has(self, version: str) -> bool:
        return self.path(version).is_dir()

    async def ensure(self, version: str, root: str) -> None:
        """Makes sure that the version's files, whose manifest is `root`, lie in `path(version)`.

        Concurrent calls for one version share the work, which goes on when a caller is cancelled. DEADLINE,
        BLOBS_UNAVAILABLE, BLOB_MISSING, BLOB_CORRUPT or RESTORE_INCOMPLETE if they can't be had.
        """
        if not _VERSION.fullmatch(version):  # it becomes a path
            raise RoostError(Reason.BAD_REQUEST, f"{version!r} is no version of an agent")
        if self.path(version).is_dir():
            return
        task = self._making.get(version)
        if task is None:
            task = asyncio.create_task(self._make(version, root), name=f"bundle {version}")
            self._making[version] = task
            task.add_done_callback(lambda done: self._made(version, done))
        await asyncio.shield(task)

    async def close(self) -> None:
        """Cancels what is being made and waits for it to end."""
        tasks = list(self._making.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _made(self, version: str, task: asyncio.Task[None]) -> None:
        del self._making[version]
        if not task.cancelled():
            task.exception()  # each caller that still waits has it; if none does, nobody asks any more

    async def _make(self, version: str, root: str) -> None:
        half_made = self._directory / f"{_HALF_MADE}{secrets.token_hex(8)}"
        try:
            async with asyncio.timeout(self._timeout):
                nodes = _readable(await decode_tree(root, self._fetch))
                half_made.mkdir(mode=0o755)
                with LocalFiles(half_made) as files:
                    await restore(files, nodes, None, Source(self._chunks, self._blobs))
                half_made.chmod(0o755)  # whatever the umask
                # A rename may survive a power cut that the bytes don't. Deploys are rare: sync everything.
                await asyncio.to_thread(os.sync)
                half_made.rename(self.path(version))
        except TimeoutError as error:
            raise RoostError(
                Reason.DEADLINE,
                f"agent version {version} could not be brought to this node within {self._timeout:g} s",
                "check the node's connection to the blob store",
            ) from error
        except OSError as error:
            raise RoostError(
                Reason.JAIL_FAILED,
                f"agent version {version} can't be put in {self._directory}: {error}",
                "check this node's disk and its permissions",
            ) from error
        finally:
            await asyncio.to_thread(shutil.rmtree, half_made, ignore_errors=True)

    async def _fetch(self, hashes: Sequence[str]) -> dict[str, bytes]:
        return {hash: blob.plain for hash, blob in (await self._blobs.get(hashes)).items()}


def _readable(nodes: Sequence[Node]) -> list[Node]:
    """The same with modes that every jail can read, whatever the manifest says."""
    result: list[Node] = []
    for node in nodes:
        match node:
            case FileNode(mode=mode):
                result.append(replace(node, mode=0o755 if mode & 0o111 else 0o644))
            case DirNode():
                result.append(replace(node, mode=0o755))
            case _:
                result.append(node)
    return result
