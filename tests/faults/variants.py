"""Roosts with one mistake each, which the harness must catch. None of this is ever imported by the daemons.

Each variant is made from the real thing and put into its place, where it is used, in a process of its own:
`python -m tests.faults.broken_coordinator --variant NAME`, and `broken_node` likewise. They pass on what they
do not change as it comes, so that they stay what they are when the real thing grows.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import coordinator.app
import coordinator.ownership
import edge_agent.app
from coordinator.blobs import BlobStore
from coordinator.collecting.collector import Settings
from coordinator.records import InstanceRecord
from edge_agent.commits import Commits
from edge_agent.link import Link
from shared.errors import Reason, Remedy, RoostError

_REPLY_LEAVES = 0.3  # seconds in which a reply surely reaches its client
_INSIST = 30.0
_AGES = 1e9

_later: set[asyncio.Task[None]] = set()


def epoch_unchecked(real: Callable[..., InstanceRecord]) -> Callable[..., InstanceRecord]:
    """Takes a commit from any node in any epoch, as long as its version is the next one."""

    def commit(current: InstanceRecord, node: str, epoch: int, *rest: Any, **more: Any) -> InstanceRecord:
        return real(current, current.node, current.epoch, *rest, **more)

    return commit


def unfenced(real: Callable[..., InstanceRecord]) -> Callable[..., InstanceRecord]:
    """Takes any commit: whoever sends one has looked at the clock."""

    def commit(
        current: InstanceRecord, node: str, epoch: int, version: int, *rest: Any, **more: Any
    ) -> InstanceRecord:
        before = replace(current, version=version - 1)
        return real(before, current.node, current.epoch, version, *rest, **more)

    return commit


def by_lease(real: type[Commits]) -> type[Commits]:
    """Looks at the clock before it commits: while its lease lasts, nobody else can be the owner."""

    class CommitsByLease(real):  # type: ignore[valid-type,misc]
        async def publish(self, *args: Any, **more: Any) -> Any:
            if not self.control._tenure.trusted(time.monotonic()):
                raise RoostError(Reason.TURN_NOT_COMMITTED, "the lease is over")
            return await real.publish(self, *args, **more)

    return CommitsByLease


def insisting(real: type[Link]) -> type[Link]:
    """Having looked at the clock, it commits, whatever it is told meanwhile."""

    class InsistingLink(real):  # type: ignore[valid-type,misc]
        async def commit(self, *args: Any, **more: Any) -> None:
            deadline = time.monotonic() + _INSIST
            while True:
                try:
                    return await real.commit(self, *args, **more)
                except RoostError as error:
                    if error.remedy is not Remedy.RETRY or time.monotonic() > deadline:
                        raise
                except asyncio.CancelledError:  # also said when a channel is closed
                    task = asyncio.current_task()
                    if task is None or task.cancelling():
                        raise
                await asyncio.sleep(0.1)

    return InsistingLink


def after_the_reply(real: type[Link]) -> type[Link]:
    """Says that it has committed, and does so a little later."""

    class LateLink(real):  # type: ignore[valid-type,misc]
        async def commit(self, *args: Any, **more: Any) -> None:
            async def later() -> None:
                await asyncio.sleep(_REPLY_LEAVES)
                await real.commit(self, *args, **more)

            task = asyncio.create_task(later())
            _later.add(task)
            task.add_done_callback(_later.discard)

    return LateLink


def without_turns(real: type[Commits]) -> type[Commits]:
    """Commits the state, and not which turn made it."""

    class CommitsWithoutTurns(real):  # type: ignore[valid-type,misc]
        async def publish(self, key: Any, captured: Any, manifest: Any, *rest: Any, **more: Any) -> Any:
            manifest = replace(manifest, turns=manifest.turns[:-1])
            return await real.publish(self, key, captured, manifest, *rest, **more)

    return CommitsWithoutTurns


def collected_at_once(real: Callable[[str], BlobStore]) -> Callable[[str], BlobStore]:
    """What nobody needed when the collector looked is deleted, whatever has been committed since."""

    class AtOnce(BlobStore):
        async def condemn(self, hashes: Sequence[str], name: str) -> int:
            moved = await super().condemn(hashes, name)
            await self.purge([entry for entry in await self.condemned() if entry.hash in hashes])
            return moved

    def open_blob_store(url: str) -> BlobStore:
        store = real(url)
        store.__class__ = AtOnce
        return store

    return open_blob_store


def of_any_age(real: type[Settings]) -> Callable[..., Settings]:
    """A clock that is behind makes what has just been put look old."""
    return lambda every, grace, rate: real(every, -_AGES, rate)


@dataclass(frozen=True, slots=True)
class Planted:
    """`make` turns what `module` knows as `name` into the broken thing."""

    module: ModuleType
    name: str
    make: Callable[[Any], Any]

    def put_in_place(self) -> None:
        setattr(self.module, self.name, self.make(getattr(self.module, self.name)))


@dataclass(frozen=True, slots=True)
class Variant:
    coordinator: tuple[Planted, ...] = ()
    node: tuple[Planted, ...] = ()


VARIANTS = {
    "epoch-unchecked": Variant(coordinator=(Planted(coordinator.ownership, "commit", epoch_unchecked),)),
    "lease-only": Variant(
        coordinator=(Planted(coordinator.ownership, "commit", unfenced),),
        node=(
            Planted(edge_agent.app, "Commits", by_lease),
            Planted(edge_agent.app, "Link", insisting),
        ),
    ),
    "reply-before-commit": Variant(node=(Planted(edge_agent.app, "Link", after_the_reply),)),
    "collected-at-once": Variant(
        coordinator=(
            Planted(coordinator.app, "open_blob_store", collected_at_once),
            Planted(coordinator.app, "Settings", of_any_age),
        )
    ),
    "turn-not-recorded": Variant(node=(Planted(edge_agent.app, "Commits", without_turns),)),
}


def break_coordinator(name: str) -> None:
    for planted in VARIANTS[name].coordinator:
        planted.put_in_place()


def break_node(name: str) -> None:
    for planted in VARIANTS[name].node:
        planted.put_in_place()
