"""Who may run an instance, and what is committed of it: promises 1, 2 and 3 rest on this file.

First the transitions, as pure functions: a record in, the next record out, or a RoostError that says why
not. Then `Ownership`, which makes each of them one transaction that compares the revision of the record
that it was computed from. A record that came from a cache may be stale: then the transaction fails and
nothing has happened. So a cache can only ever cost time.

Invariants, checked at every transition: the epoch only grows, by 1; within an epoch there is one owner; the
version grows by at most 1, and only within an epoch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from coordinator.records import InstanceRecord, Phase, Stored, instance_key
from coordinator.store.base import Expect, Put, Store
from shared.errors import Reason, RoostError
from shared.identity import InstanceKey

_ATTEMPTS = 5  # a record is written about once a turn; losing this often to others is a bug elsewhere


class InvariantBroken(Exception):
    """A transition would break promise 1: a bug. Nothing was written."""


# --- transitions -----------------------------------------------------------------------------------


def place(
    current: InstanceRecord | None,
    key: InstanceKey,
    node: str,
    why: str,
    agent_version: str,
    now_unix: float,
) -> InstanceRecord:
    """A new owner in a new epoch. What was committed stays."""
    new = InstanceRecord(
        key=key,
        epoch=current.epoch + 1 if current else 1,
        node=node,
        version=current.version if current else 0,
        root=current.root if current else "",
        last_turn=current.last_turn if current else "",
        phase=Phase.PLACED,
        why=why,
        agent_version=agent_version,
        placed_at_unix=now_unix,
    )
    return _checked(current, new)


def wake(current: InstanceRecord | None, node: str, epoch: int, agent_version: str) -> InstanceRecord:
    """Its owner starts its process, with this version of the agent. EPOCH_STALE if `node` does not own it."""
    owned = _owned(current, node, epoch)
    return _checked(owned, replace(owned, phase=Phase.LIVE, agent_version=agent_version))


def commit(
    current: InstanceRecord | None, node: str, epoch: int, version: int, root: str, turn_id: str
) -> InstanceRecord:
    """The next state version. `current` itself if this very commit was applied before.

    EPOCH_STALE if `node` does not own it in `epoch`, or if `version` is not the next one.
    """
    owned = _owned(current, node, epoch)
    if (version, root) == (owned.version, owned.root):
        return owned
    if version != owned.version + 1:
        raise RoostError(
            Reason.EPOCH_STALE,
            f"{owned.key} is at version {owned.version}, so {version} can't be committed next",
            "the node must fetch the instance again before it goes on",
        )
    return _checked(owned, replace(owned, version=version, root=root, last_turn=turn_id, phase=Phase.LIVE))


def hibernate(current: InstanceRecord | None, node: str, epoch: int) -> InstanceRecord:
    """Its process is gone. `current` itself if that was known. EPOCH_STALE if `node` does not own it."""
    owned = _owned(current, node, epoch)
    if owned.phase is Phase.HIBERNATED:
        return owned
    return _checked(owned, replace(owned, phase=Phase.HIBERNATED))


def _owned(current: InstanceRecord | None, node: str, epoch: int) -> InstanceRecord:
    if current is not None and (current.node, current.epoch) == (node, epoch):
        return current
    now = f"{current.node} owns it in epoch {current.epoch}" if current else "it was never placed"
    raise RoostError(
        Reason.EPOCH_STALE,
        f"{node} does not own this instance in epoch {epoch}: {now}",
        "resolve again: its state is safe with its owner",
    )


def _checked(old: InstanceRecord | None, new: InstanceRecord) -> InstanceRecord:
    if old is None:
        holds = new.epoch == 1 and new.version == 0
    elif new.epoch == old.epoch:
        same = (new.version, new.root) == (old.version, old.root)
        holds = new.node == old.node and (same or new.version == old.version + 1)
    else:
        holds = new.epoch == old.epoch + 1 and (new.version, new.root) == (old.version, old.root)
    if not holds or (old is not None and new.key != old.key) or bool(new.version) != bool(new.root):
        raise InvariantBroken(f"{old} may not become {new}")
    return new


# --- transactions ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Placed:
    record: Stored[InstanceRecord]


@dataclass(frozen=True, slots=True)
class Overtaken:
    """Somebody else wrote first; this is what the store says now."""

    record: Stored[InstanceRecord] | None


class Recent(Protocol):
    """What was last seen of instances. May be stale or empty."""

    def instance(self, key: InstanceKey) -> Stored[InstanceRecord] | None: ...

    def learn_instance(self, stored: Stored[InstanceRecord]) -> None: ...


class Ownership:
    """The transitions as transactions. Every method may raise STORE_UNAVAILABLE, which leaves open whether
    it was applied: asking again is always safe, since all of them can be repeated."""

    def __init__(self, store: Store, recent: Recent, clock_unix: Callable[[], float], timeout: float) -> None:
        """`timeout` in seconds, for each of the store's answers."""
        self._store = store
        self._recent = recent
        self._clock_unix = clock_unix
        self._timeout = timeout

    async def read(self, key: InstanceKey) -> Stored[InstanceRecord] | None:
        """What the store says now, not a cache."""
        record = await self._store.get(instance_key(key), self._timeout)
        if record is None:
            return None
        stored = InstanceRecord.decode(record)
        self._recent.learn_instance(stored)
        return stored

    async def place(
        self,
        key: InstanceKey,
        expected: Stored[InstanceRecord] | None,
        node: str,
        why: str,
        agent_version: str,
    ) -> Placed | Overtaken:
        """Makes `node` the owner, if the record is still `expected`."""
        current = expected.value if expected else None
        new = place(current, key, node, why, agent_version, self._clock_unix())
        stored = await self._write(expected, new)
        return Placed(stored) if stored else Overtaken(await self.read(key))

    async def wake(
        self, key: InstanceKey, node: str, epoch: int, agent_version: str
    ) -> Stored[InstanceRecord]:
        """The record, now live: read from the store, or compared there when it was written. EPOCH_STALE."""
        return await self._apply(key, lambda c: wake(c, node, epoch, agent_version))

    async def commit(
        self, node: str, key: InstanceKey, epoch: int, version: int, root: str, turn_id: str
    ) -> Stored[InstanceRecord]:
        """Returns once the version is durable in the store. EPOCH_STALE: it never will be."""
        return await self._apply(key, lambda c: commit(c, node, epoch, version, root, turn_id))

    async def hibernate(self, node: str, key: InstanceKey, epoch: int) -> Stored[InstanceRecord]:
        return await self._apply(key, lambda c: hibernate(c, node, epoch))

    async def hibernate_if_unchanged(self, seen: Stored[InstanceRecord]) -> None:
        """Like `hibernate`, but only if nothing was written since `seen`; otherwise nothing happens."""
        await self._write(seen, hibernate(seen.value, seen.value.node, seen.value.epoch))

    async def _apply(
        self,
        key: InstanceKey,
        transition: Callable[[InstanceRecord | None], InstanceRecord],
    ) -> Stored[InstanceRecord]:
        """Applies `transition` to the record, which is read anew whenever another writer was faster.

        A refusal, or "it was applied before", is only ever said of what was read from the store.
        """
        if done := await self._apply_to_recent(key, transition):
            return done
        for _ in range(_ATTEMPTS):
            seen = await self.read(key)
            new = transition(seen.value if seen else None)
            if seen is not None and new == seen.value:
                return seen
            if done := await self._write(seen, new):
                return done
        raise RoostError(
            Reason.STORE_UNAVAILABLE,
            f"the record of {key} changed {_ATTEMPTS} times while it was being written",
            "try again",
        )

    async def _apply_to_recent(
        self, key: InstanceKey, transition: Callable[[InstanceRecord | None], InstanceRecord]
    ) -> Stored[InstanceRecord] | None:
        seen = self._recent.instance(key)
        if seen is None:
            return None
        try:
            new = transition(seen.value)
        except RoostError:
            return None
        return None if new == seen.value else await self._write(seen, new)

    async def _write(
        self, seen: Stored[InstanceRecord] | None, new: InstanceRecord
    ) -> Stored[InstanceRecord] | None:
        """`new` as it was stored; None if the record is no longer `seen`."""
        name = instance_key(new.key)
        guard = Expect(name, seen.revision if seen else 0)
        try:
            result = await self._store.txn([guard], [Put(name, new.encode())], self._timeout)
        except RoostError as error:
            if error.reason is not Reason.STORE_UNAVAILABLE:
                raise
            return await self._read_back(new, error)
        if not result.succeeded:
            return None
        stored = Stored(new, result.revision)
        self._recent.learn_instance(stored)
        return stored

    async def _read_back(self, new: InstanceRecord, error: RoostError) -> Stored[InstanceRecord]:
        """The transaction may have been applied although no answer came. If what the store holds is
        what was to be written, it was (or another's equal one was, which is the same to everybody).
        Anything else says nothing: it may yet be applied, or was and then written over."""
        found = await self.read(new.key)
        if found is not None and found.value == new:
            return found
        raise error
