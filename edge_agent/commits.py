"""Makes a turn durable: what it changed to the blob store, then its root to the coordinator; or both in one
commit, if it changed little.

Always true: the root is published only after all that it names is stored, or in the same transaction. All
steps can be repeated without harm, and are, until their time is over; an outcome that is then uncertain is
said to be so (the caller ends the process, and the next turn starts from what the coordinator has). What a
commit relies on was put or asked for since the round of collecting that it names
(coordinator/collecting/rounds.py).

How it can fail: EPOCH_STALE, when another node owns the instance; TIMER_LIMIT, when the turn set too many
timers; TENANT_QUOTA; all else becomes TURN_NOT_COMMITTED.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from edge_agent.control import ALONE, Beside, Commit, ControlPlane
from edge_agent.state.index import Index
from edge_agent.state.snapshot import Encoding, Snapshot
from edge_agent.state.store import StateStore
from shared.errors import Reason, Remedy, RoostError
from shared.failpoints import failpoint
from shared.identity import InstanceKey
from shared.lifecycle import retry_until
from shared.manifest import StateManifest

T = TypeVar("T")
Publish = Callable[[Commit], Awaitable[None]]

_TO_SEND = 3  # turns of the loop after which a commit is on its way
_PREPARED_ANEW = 4  # tries in all, of a turn that rounds of collecting overtake
_ROUND_PAUSE = 0.5  # seconds, within which a heartbeat tells of the new round
_CERTAIN = (Reason.EPOCH_STALE, Reason.TIMER_LIMIT, Reason.TENANT_QUOTA)  # it was not applied
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
        beside: Beside = ALONE,
        base: StateManifest | None = None,
    ) -> tuple[str, Index]:
        """The manifest's root, and the index to capture the next turn from. `abandoned`: no need to go on.
        `base`: the committed version that it was made from, of root `manifest.parent`."""
        try:
            encoded = await self.state.encode(manifest, base)
            commit = Commit(manifest.version, encoded.root, turn_id, manifest.size, beside)
            publish = partial(self._commit, key, manifest.epoch, abandoned)
            keeping = asyncio.create_task(self._keep(encoded), name="keep a manifest")
            try:
                await self._prepare_and(publish, commit, captured, encoded, abandoned)
            finally:
                await keeping
        except RoostError as error:
            if error.reason in _CERTAIN:
                raise
            raise RoostError(
                Reason.TURN_NOT_COMMITTED,
                f"the turn was run but could not be committed: {error.message}",
                "send it again under the same id: it is applied once",
            ) from error
        return encoded.root, captured.committed

    async def _prepare_and(
        self,
        publish: Publish,
        commit: Commit,
        captured: Snapshot,
        encoded: Encoding,
        abandoned: Callable[[], bool],
    ) -> None:
        """All that it needs is put, and then it is committed; both once more when a round has begun since."""
        uploads = itertools.count()
        for tries in itertools.count(1):
            # Known before anything is put or asked for.
            now = replace(commit, gc_round=self.control.gc_round)
            try:
                little = self.state.little(captured, encoded)
                if little is None or not await self._commit_with(publish, replace(now, inline=tuple(little))):
                    failpoint("node.commit.before_upload")
                    await self._upload(captured, encoded, abandoned, uploads)
                    await publish(now)
                return
            except RoostError as error:
                if error.reason is not Reason.UPLOAD_STALE or tries == _PREPARED_ANEW or abandoned():
                    raise
            await asyncio.sleep(_ROUND_PAUSE)

    async def _keep(self, encoded: Encoding) -> None:
        """While the coordinator is waited for anyway."""
        for _ in range(_TO_SEND):
            await asyncio.sleep(0)
        await self.state.keep(encoded)

    async def _commit_with(self, publish: Publish, commit: Commit) -> bool:
        """False: the coordinator does not take the blobs along."""
        try:
            await publish(commit)
        except RoostError as error:
            if error.reason is not Reason.BLOBS_UNAVAILABLE:
                raise
            return False
        return True

    async def _commit(
        self, key: InstanceKey, epoch: int, abandoned: Callable[[], bool], commit: Commit
    ) -> None:
        def go_on(error: RoostError) -> bool:
            return error.reason is not Reason.BLOBS_UNAVAILABLE and not abandoned()

        failpoint("node.commit.before_call")
        await self._until(
            self.commit_seconds,
            lambda left: self.control.commit(key, epoch, commit, min(left, _ATTEMPT_SECONDS)),
            go_on,
        )

    async def _upload(
        self,
        captured: Snapshot,
        encoded: Encoding,
        abandoned: Callable[[], bool],
        uploads: Iterator[int],
    ) -> None:
        async def attempt(left: float) -> None:
            try:
                async with asyncio.timeout(left):
                    await self.state.upload(captured, encoded, again=next(uploads) > 0)
            except TimeoutError as error:
                raise RoostError(
                    Reason.BLOBS_UNAVAILABLE, f"{self.upload_seconds:g} s were not enough to store it"
                ) from error

        await self._until(self.upload_seconds, attempt, lambda error: not abandoned())

    async def _until(
        self, seconds: float, attempt: Callable[[float], Awaitable[T]], go_on: Callable[[RoostError], bool]
    ) -> T:
        return await retry_until(
            asyncio.get_running_loop().time() + seconds,
            attempt,
            lambda e: isinstance(e, RoostError) and e.remedy is Remedy.RETRY and go_on(e),
        )
