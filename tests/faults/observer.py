"""Writes down every record of an instance that etcd ever holds, in the order of its revisions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import cast

from coordinator.records import INSTANCES, InstanceRecord
from coordinator.store.base import Change, Store
from coordinator.store.etcd import open_etcd
from shared.errors import RoostError
from tests.faults.history import Held, History
from tests.support.eventually import eventually


class Observer:
    def __init__(self, store: Store, history: History, from_revision: int) -> None:
        self._store = store
        self._history = history
        self._next = from_revision

    async def run(self) -> None:
        while True:
            try:
                changes = cast("AsyncIterator[Sequence[Change]]", self._store.watch(INSTANCES, self._next))
                async with aclosing(changes) as batches:  # type: ignore[type-var]
                    async for batch in batches:
                        for change in batch:
                            self._note(change)
            except RoostError:
                await asyncio.sleep(0.1)

    def _note(self, change: Change) -> None:
        assert change.record is not None, "records of instances are never deleted"
        stored = InstanceRecord.decode(change.record)
        self._next = stored.revision + 1
        value = stored.value
        self._history.held.append(
            Held(
                stored.revision,
                value.key.user,
                value.epoch,
                value.node,
                value.version,
                value.root,
                value.last_turn,
            )
        )

    async def caught_up(self, timeout: float) -> None:
        """Until it has all that etcd holds at this moment."""
        listing = await self._store.list(INSTANCES, timeout)
        latest = max((record.revision for record in listing.records), default=0)
        await eventually(lambda: self._next > latest, timeout, "the observer has seen all")


@asynccontextmanager
async def observing(endpoints: Sequence[str], history: History) -> AsyncIterator[Observer]:
    """From now on, for as long as the block lasts."""
    async with open_etcd(endpoints) as store:
        listing = await store.list(INSTANCES)
        observer = Observer(store, history, listing.revision + 1)
        task = asyncio.create_task(observer.run(), name="observer")
        try:
            yield observer
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
