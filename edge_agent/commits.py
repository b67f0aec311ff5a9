"""Makes a turn durable: what it changed to the blob store, then its root to the coordinator.

Always true: the root is published only after all that it names is stored. Both steps can be repeated without
harm, and are, until their time is over; an outcome that is then uncertain is said to be so (the caller ends
the process, and the next turn starts from what the coordinator has).

How it can fail: EPOCH_STALE, when another node owns the instance; all else becomes TURN_NOT_COMMITTED.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from edge_agent.control import ControlPlane
from edge_agent.state.index import Index
from edge_agent.state.snapshot import Snapshot
from edge_agent.state.store import StateStore
from shared.errors import Reason, Remedy, RoostError
from shared.identity import InstanceKey
from shared.lifecycle import retry_until
from shared.manifest import StateManifest

T = TypeVar("T")

_ATTEMPT_SECONDS = 2.0  # of one commit call, so that an eviction is noticed soon


@dataclass(frozen=True, slots=True)
class Commits:
    """`upload_seconds` for a turn's changes to reach the blob store, over a bad line too; then
    `commit_seconds` for its outcome to be certain."""

    state: StateStore
    control: ControlPlane
    upload_seconds: float = 60.0
    commit_seconds: float = 10.0

    async def publish(
        self,
        key: InstanceKey,
        captured: Snapshot,
        manifest: StateManifest,
        turn_id: str,
        abandoned: Callable[[], bool],
    ) -> tuple[str, Index]:
        """The manifest's root, and the index to capture the next turn from. `abandoned`: no need to go on."""
        try:
            root, index = await self._upload(captured, manifest, abandoned)
            await self._until(
                self.commit_seconds,
                lambda left: self.control.commit(
                    key, manifest.epoch, manifest.version, root, turn_id, min(left, _ATTEMPT_SECONDS)
                ),
                abandoned,
            )
        except RoostError as error:
            if error.reason is Reason.EPOCH_STALE:
                raise
            raise RoostError(
                Reason.TURN_NOT_COMMITTED,
                f"the turn was run but could not be committed: {error.message}",
                "send it again under the same id: it is applied once",
            ) from error
        return root, index

    async def _upload(
        self, captured: Snapshot, manifest: StateManifest, abandoned: Callable[[], bool]
    ) -> tuple[str, Index]:
        tries = itertools.count()

        async def attempt(left: float) -> tuple[str, Index]:
            try:
                async with asyncio.timeout(left):
                    return await self.state.upload(captured, manifest, again=next(tries) > 0)
            except TimeoutError as error:
                raise RoostError(
                    Reason.BLOBS_UNAVAILABLE, f"{self.upload_seconds:g} s were not enough to store it"
                ) from error

        return await self._until(self.upload_seconds, attempt, abandoned)

    async def _until(
        self, seconds: float, attempt: Callable[[float], Awaitable[T]], abandoned: Callable[[], bool]
    ) -> T:
        return await retry_until(
            asyncio.get_running_loop().time() + seconds,
            attempt,
            lambda e: isinstance(e, RoostError) and e.remedy is Remedy.RETRY and not abandoned(),
        )
