"""Who may run an instance, and what is committed of it: promises 1, 2 and 3 rest on this.

`Ownership` makes each transition (`coordinator.transitions`, which are pure) one transaction that compares
the revision of the record that it was computed from. A record that came from a cache may be stale: then the
transaction fails and nothing has happened. So a cache can only ever cost time.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from coordinator.collecting.rounds import Fence, NoFence
from coordinator.records import InstanceRecord, Stored, instance_key
from coordinator.store.base import Delete, Expect, Put, Store
from coordinator.transitions import commit, hibernate, place, replace_state, resize, wake
from shared.errors import Reason, RoostError
from shared.failpoints import failpoint
from shared.identity import InstanceKey
from shared.resources import Resources

_ATTEMPTS = 5  # a record is written about once a turn; losing this often to others is a bug elsewhere


@dataclass(frozen=True, slots=True)
class Placed:
    record: Stored[InstanceRecord]


@dataclass(frozen=True, slots=True)
class Overtaken:
    """Somebody else wrote first; this is what the store says now."""

    record: Stored[InstanceRecord] | None


@dataclass(frozen=True, slots=True)
class Extra:
    """What else a transaction compares and writes."""

    guards: Sequence[Expect] = ()
    writes: Sequence[Put | Delete] = ()


NO_EXTRA = Extra()
# Asked anew for each attempt; whether a cache must not be believed.
Beside = Callable[[bool], Awaitable[Extra]]


def along_with(writes: Sequence[Put | Delete]) -> Beside:
    """What is the same in each attempt."""

    async def extra(_fresh: bool) -> Extra:
        return Extra(writes=writes)

    return extra


_alone = along_with(())


@dataclass(frozen=True, slots=True)
class Uploaded:
    """A version's files: how many bytes they are together, and the round of collecting that had begun before
    the first blob of them was put or asked for."""

    state_bytes: int = 0
    gc_round: int = 0


_UNKNOWN = Uploaded()


class Recent(Protocol):
    """What was last seen of instances. May be stale or empty."""

    def instance(self, key: InstanceKey) -> Stored[InstanceRecord] | None: ...

    def learn_instance(self, stored: Stored[InstanceRecord]) -> None: ...


class Ownership:
    """The transitions as transactions. Every method may raise STORE_UNAVAILABLE, which leaves open whether
    it was applied: asking again is always safe, since all of them can be repeated."""

    def __init__(
        self,
        store: Store,
        recent: Recent,
        clock_unix: Callable[[], float],
        timeout: float,
        fence: Fence | None = None,
    ) -> None:
        """`timeout` in seconds, for each of the store's answers. `fence`: what a commit may rely on."""
        self._store = store
        self._recent = recent
        self._clock_unix = clock_unix
        self._timeout = timeout
        self._fence = fence or NoFence()

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
        home: str = "",
    ) -> Placed | Overtaken:
        """Makes `node` the owner, if the record is still `expected`."""
        current = expected.value if expected else None
        new = place(current, key, node, why, agent_version, self._clock_unix(), home)
        failpoint("coordinator.place.before_txn")
        stored = await self._write(expected, new)
        failpoint("coordinator.place.after_txn")
        return Placed(stored) if stored else Overtaken(await self.read(key))

    async def wake(
        self, key: InstanceKey, node: str, epoch: int, agent_version: str
    ) -> Stored[InstanceRecord]:
        """The record, now live: read from the store, or compared there when it was written. EPOCH_STALE."""
        return await self._apply(key, lambda c: wake(c, node, epoch, agent_version))

    async def commit(
        self,
        node: str,
        key: InstanceKey,
        epoch: int,
        version: int,
        root: str,
        turn_id: str,
        beside: Beside = _alone,
        files: Uploaded = _UNKNOWN,
    ) -> Stored[InstanceRecord]:
        """Returns once the version is durable in the store, and what `beside` says with it, in the same
        transaction. EPOCH_STALE: it never will be; or what `beside` refuses by. UPLOAD_STALE: their
        `gc_round` was too long ago."""
        failpoint("coordinator.commit.before_txn")
        stored = await self._apply(
            key,
            lambda c: commit(c, node, epoch, version, root, turn_id, files.state_bytes),
            self._fenced(files.gc_round, beside),
        )
        failpoint("coordinator.commit.before_answer")
        return stored

    async def replace_state(
        self, key: InstanceKey, version: int, root: str, state_bytes: int, why: str, gc_round: int
    ) -> Stored[InstanceRecord]:
        """Returns once it is durable in the store. STATE_CHANGED: it never will be. UPLOAD_STALE as above."""
        return await self._apply(
            key,
            lambda c: replace_state(c, key, version, root, state_bytes, why),
            self._fenced(gc_round, _alone),
        )

    async def beside(
        self,
        key: InstanceKey,
        transition: Callable[[InstanceRecord | None], InstanceRecord],
        guards: Sequence[Expect],
        writes: Sequence[Put | Delete],
    ) -> int | None:
        """Writes what is not the record itself, in one transaction with the record's transition; returns the
        revision. None: one of `guards` does not hold, and nothing was written."""
        seen = self._recent.instance(key)
        for _ in range(_ATTEMPTS):
            try:
                new = transition(seen.value if seen else None)
            except RoostError:  # it may be right of what the store says
                seen = await self.read(key)
                new = transition(seen.value if seen else None)
            same = seen is not None and new == seen.value
            name = instance_key(key)
            all_guards = [Expect(name, seen.revision if seen else 0), *guards]
            all_writes = writes if same else [Put(name, new.encode()), *writes]
            result = await self._store.txn(all_guards, all_writes, self._timeout)
            if result.succeeded:
                if not same:
                    self._recent.learn_instance(Stored(new, result.revision))
                return result.revision
            before, seen = seen, await self.read(key)
            if seen == before:
                return None
        raise _contended(key)

    async def resize(
        self, node: str, key: InstanceKey, epoch: int, size: Resources | None
    ) -> Stored[InstanceRecord]:
        return await self._apply(key, lambda c: resize(c, node, epoch, size))

    async def hibernate(self, node: str, key: InstanceKey, epoch: int) -> Stored[InstanceRecord]:
        return await self._apply(key, lambda c: hibernate(c, node, epoch))

    async def hibernate_if_unchanged(self, seen: Stored[InstanceRecord]) -> None:
        """Like `hibernate`, but only if nothing was written since `seen`; otherwise nothing happens."""
        await self._write(seen, hibernate(seen.value, seen.value.node, seen.value.epoch))

    async def _apply(
        self,
        key: InstanceKey,
        transition: Callable[[InstanceRecord | None], InstanceRecord],
        beside: Beside = _alone,
    ) -> Stored[InstanceRecord]:
        """Applies `transition` to the record, which is read anew whenever another writer was faster.

        A refusal, or "it was applied before", is only ever said of what was read from the store.
        """
        if done := await self._apply_to_recent(key, transition, beside):
            return done
        for _ in range(_ATTEMPTS):
            seen = await self.read(key)
            new = transition(seen.value if seen else None)
            if seen is not None and new == seen.value:
                return seen
            if done := await self._write(seen, new, await beside(True)):
                return done
        raise _contended(key)

    def _fenced(self, gc_round: int, beside: Beside) -> Beside:
        """As `beside`, by a transaction that relies on blobs which were put or asked for since `gc_round`."""

        async def extra(fresh: bool) -> Extra:
            asked = await beside(fresh)
            return Extra((*asked.guards, *await self._fence.guard(gc_round, fresh)), asked.writes)

        return extra

    async def _apply_to_recent(
        self,
        key: InstanceKey,
        transition: Callable[[InstanceRecord | None], InstanceRecord],
        beside: Beside,
    ) -> Stored[InstanceRecord] | None:
        seen = self._recent.instance(key)
        if seen is None:
            return None
        try:
            new = transition(seen.value)
            extra = await beside(False)
        except RoostError:
            return None
        return None if new == seen.value else await self._write(seen, new, extra)

    async def _write(
        self,
        seen: Stored[InstanceRecord] | None,
        new: InstanceRecord,
        extra: Extra = NO_EXTRA,
    ) -> Stored[InstanceRecord] | None:
        """`new` as it was stored; None if the record is no longer `seen`, or a guard does not hold."""
        name = instance_key(new.key)
        guards = [Expect(name, seen.revision if seen else 0), *extra.guards]
        try:
            result = await self._store.txn(guards, [Put(name, new.encode()), *extra.writes], self._timeout)
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


def _contended(key: InstanceKey) -> RoostError:
    return RoostError(
        Reason.STORE_UNAVAILABLE,
        f"the record of {key} changed {_ATTEMPTS} times while it was being written",
        "try again",
    )
