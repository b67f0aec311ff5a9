"""What every Store must do; run against the fake and against a real etcd."""

from __future__ import annotations

import asyncio
import itertools
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from coordinator.store.base import Change, Compacted, Delete, Expect, Put, Store
from coordinator.store.etcd import open_etcd
from coordinator.store.memory import MemoryStore
from shared.errors import Reason, RoostError
from tests.support.etcd import Etcd, running_etcd
from tests.support.eventually import eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")


@dataclass
class Backend:
    """A store, what a test must be able to do to it from outside, and a prefix that is the test's own."""

    store: Store
    etcd: Etcd | None
    prefix: str

    async def compact(self, revision: int) -> None:
        if self.etcd is not None:
            await self.etcd.compact(revision)
        else:
            assert isinstance(self.store, MemoryStore)
            self.store.compact(revision)

    async def pass_time(self, seconds: float) -> None:
        """At least `seconds` on the store's clock."""
        if isinstance(self.store, MemoryStore):
            self.store.advance(seconds)
        else:
            await asyncio.sleep(seconds)  # a lease of a real etcd runs on real time

    async def put(self, key: str, value: bytes, lease: int = 0) -> int:
        return (await self.store.txn([], [Put(self.prefix + key, value, lease)])).revision


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["memory", "etcd"])
async def shared_store(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[Store, Etcd | None]]:
    if request.param == "memory":
        yield MemoryStore(), None
    else:
        async with running_etcd(tmp_path_factory.mktemp("etcd")) as etcd:
            async with open_etcd([etcd.endpoint]) as store:
                yield store, etcd


_numbers = itertools.count()


@pytest.fixture
def backend(shared_store: tuple[Store, Etcd | None]) -> Backend:
    store, etcd = shared_store
    return Backend(store, etcd, f"t{next(_numbers)}/")


async def take(changes: AsyncIterator[Sequence[Change]], count: int) -> list[Change]:
    found: list[Change] = []
    async with asyncio.timeout(5):
        while len(found) < count:
            found += await anext(changes)
    return found


def watching(store: Store, prefix: str, revision: int) -> Any:
    return aclosing(store.watch(prefix, revision))  # type: ignore[type-var]


async def test_what_was_put_is_got_with_its_revision(backend: Backend) -> None:
    assert await backend.store.get(backend.prefix + "a") is None
    revision = await backend.put("a", b"\x00\xffvalue")
    record = await backend.store.get(backend.prefix + "a")
    assert record is not None
    assert (record.key, record.value, record.revision) == (backend.prefix + "a", b"\x00\xffvalue", revision)


async def test_a_revision_grows_with_every_write_and_only_then(backend: Backend) -> None:
    first = await backend.put("a", b"1")
    second = await backend.put("b", b"1")
    assert second > first
    refused = await backend.store.txn(
        [Expect(backend.prefix + "a", 999_999)], [Put(backend.prefix + "a", b"2")]
    )
    assert not refused.succeeded
    assert refused.revision == second
    nothing = await backend.store.txn([], [Delete(backend.prefix + "none")])
    assert nothing.succeeded
    assert (await backend.store.list(backend.prefix)).revision == second


async def test_a_guard_of_zero_means_absent(backend: Backend) -> None:
    key = backend.prefix + "a"
    assert (await backend.store.txn([Expect(key, 0)], [Put(key, b"1")])).succeeded
    assert not (await backend.store.txn([Expect(key, 0)], [Put(key, b"2")])).succeeded
    await backend.store.txn([], [Delete(key)])
    assert (await backend.store.txn([Expect(key, 0)], [Put(key, b"3")])).succeeded


async def test_all_writes_of_a_transaction_are_made_or_none(backend: Backend) -> None:
    a, b, c = (backend.prefix + x for x in "abc")
    at = await backend.put("a", b"1")
    lost = await backend.store.txn([Expect(a, at), Expect(b, 7)], [Put(a, b"2"), Put(c, b"2")])
    assert not lost.succeeded
    assert [r.value for r in (await backend.store.list(backend.prefix)).records] == [b"1"]
    won = await backend.store.txn([Expect(a, at), Expect(b, 0)], [Delete(a), Put(b, b"2"), Put(c, b"2")])
    assert won.succeeded
    listing = await backend.store.list(backend.prefix)
    assert [(r.key, r.revision) for r in listing.records] == [(b, won.revision), (c, won.revision)]


async def test_of_two_transactions_on_one_revision_one_wins(backend: Backend) -> None:
    key = backend.prefix + "a"
    for round_ in range(20):
        record = await backend.store.get(key)
        guard = Expect(key, record.revision if record else 0)
        results = await asyncio.gather(
            *(backend.store.txn([guard], [Put(key, f"{round_}.{i}".encode())]) for i in range(5))
        )
        assert [r.succeeded for r in results].count(True) == 1


async def test_a_list_holds_its_prefix_only_sorted_and_in_full(backend: Backend) -> None:
    names = [f"{i:05d}" for i in range(2500)]  # more than a page
    for start in range(0, len(names), 100):
        writes = [Put(f"{backend.prefix}x/{n}", n.encode()) for n in names[start : start + 100]]
        await backend.store.txn([], writes)
    await backend.put("x0", b"beside")
    listing = await backend.store.list(backend.prefix + "x/")
    assert [r.value.decode() for r in listing.records] == names
    assert (await backend.store.list(backend.prefix + "nothing/")).records == ()


async def test_a_watch_after_a_list_misses_nothing(backend: Backend) -> None:
    await backend.put("a", b"1")
    listing = await backend.store.list(backend.prefix)
    await backend.put("a", b"2")  # between list and watch
    async with watching(backend.store, backend.prefix, listing.revision + 1) as changes:
        await backend.put("b", b"3")
        await backend.store.txn([], [Delete(backend.prefix + "a")])
        found = await take(changes, 3)
    assert [(c.key[-1], c.record and c.record.value) for c in found] == [
        ("a", b"2"),
        ("b", b"3"),
        ("a", None),
    ]
    assert [c.revision for c in found] == sorted({c.revision for c in found})


async def test_a_watch_sees_no_other_prefix_and_no_earlier_change(backend: Backend) -> None:
    await backend.put("x/a", b"before")
    revision = await backend.put("y", b"beside")
    async with watching(backend.store, backend.prefix + "x/", revision + 1) as changes:
        await backend.put("y", b"beside")
        await backend.put("x/b", b"seen")
        found = await take(changes, 1)
    assert [c.record.value for c in found if c.record] == [b"seen"]


async def test_a_watch_from_before_a_compaction_says_compacted(backend: Backend) -> None:
    first = await backend.put("a", b"1")
    for i in range(5):
        last = await backend.put("a", str(i).encode())
    await backend.compact(last)
    async with asyncio.timeout(5):
        with pytest.raises(Compacted):
            async with watching(backend.store, backend.prefix, first) as changes:
                await anext(changes)
    listing = await backend.store.list(backend.prefix)
    assert listing.records[0].value == b"4"
    async with watching(backend.store, backend.prefix, listing.revision + 1) as changes:
        await backend.put("a", b"after")
        assert len(await take(changes, 1)) == 1


async def test_a_compaction_does_not_disturb_a_watch_that_keeps_up(backend: Backend) -> None:
    revision = await backend.put("a", b"1")
    async with watching(backend.store, backend.prefix, revision) as changes:
        await take(changes, 1)
        await backend.compact(await backend.put("a", b"2"))
        await backend.put("a", b"3")
        assert [c.record.value for c in await take(changes, 2) if c.record] == [b"2", b"3"]


async def test_a_lease_takes_its_keys_with_it_unless_kept_alive(backend: Backend) -> None:
    lease = await backend.store.grant_lease(1.0)
    await backend.put("mine", b"1", lease)
    for _ in range(4):
        await backend.pass_time(0.5)
        assert await backend.store.keep_alive(lease)
    assert await backend.store.get(backend.prefix + "mine") is not None
    await backend.pass_time(2.0)

    async def gone() -> bool:
        return await backend.store.get(backend.prefix + "mine") is None

    await eventually(gone, 5)
    assert not await backend.store.keep_alive(lease)


async def test_a_revoked_lease_is_gone_and_revoking_twice_is_no_error(backend: Backend) -> None:
    lease = await backend.store.grant_lease(60)
    await backend.put("mine", b"1", lease)
    await backend.store.revoke_lease(lease)
    assert await backend.store.get(backend.prefix + "mine") is None
    await backend.store.revoke_lease(lease)
    assert not await backend.store.keep_alive(lease)


async def test_a_key_that_is_put_again_without_a_lease_outlives_it(backend: Backend) -> None:
    lease = await backend.store.grant_lease(60)
    await backend.put("mine", b"1", lease)
    await backend.put("mine", b"2")
    await backend.store.revoke_lease(lease)
    assert await backend.store.get(backend.prefix + "mine") is not None


async def test_a_put_under_a_lease_that_is_gone_is_refused(backend: Backend) -> None:
    lease = await backend.store.grant_lease(60)
    await backend.store.revoke_lease(lease)
    with pytest.raises(RoostError) as caught:
        await backend.put("mine", b"1", lease)
    assert caught.value.reason is Reason.STORE_UNAVAILABLE
    assert await backend.store.get(backend.prefix + "mine") is None


# --- what only a real one can go through -----------------------------------------------------------


@pytest_asyncio.fixture(loop_scope="module")
async def real(tmp_path: Path) -> AsyncIterator[tuple[Etcd, Store]]:
    async with running_etcd(tmp_path) as etcd, open_etcd([etcd.endpoint]) as store:
        yield etcd, store


async def calls_refused(store: Store, timeout: float) -> None:
    calls = (
        store.get("a", timeout=timeout),
        store.list("a", timeout=timeout),
        store.txn([], [Put("a", b"")], timeout=timeout),
        store.grant_lease(5, timeout=timeout),
        store.keep_alive(1, timeout=timeout),
        store.revoke_lease(1, timeout=timeout),
    )
    results = await asyncio.gather(*calls, return_exceptions=True)
    for result in results:
        assert isinstance(result, RoostError), result
        assert result.reason is Reason.STORE_UNAVAILABLE
        assert result.hint


async def test_fault_etcd_suspended_every_call_says_so_in_time_and_goes_on_after(
    real: tuple[Etcd, Store],
) -> None:
    etcd, store = real
    await store.txn([], [Put("a", b"1")])
    etcd.suspend()
    try:
        async with asyncio.timeout(2):
            await calls_refused(store, 0.5)
    finally:
        etcd.resume()
    record = await store.get("a")
    assert record is not None


async def test_fault_etcd_restarted_data_and_watch_go_on(real: tuple[Etcd, Store]) -> None:
    etcd, store = real
    revision = (await store.txn([], [Put("a", b"1")])).revision
    async with watching(store, "a", revision) as changes:
        assert len(await take(changes, 1)) == 1
        await etcd.stop()
        await calls_refused(store, 0.5)
        following = asyncio.create_task(take(changes, 3))
        await etcd.start()

        async def back() -> bool:
            try:
                return await store.get("a", timeout=1.0) is not None
            except RoostError:
                return False

        await eventually(back, 5)
        for i in range(3):
            await store.txn([], [Put("a", str(i).encode())])
        assert [c.record.value for c in await following if c.record] == [b"0", b"1", b"2"]


async def test_fault_compacted_while_etcd_was_away_the_watch_says_so(real: tuple[Etcd, Store]) -> None:
    etcd, store = real
    revision = (await store.txn([], [Put("a", b"1")])).revision
    async with watching(store, "a", revision) as changes:
        await take(changes, 1)
        following = asyncio.create_task(take(changes, 1))
        await etcd.stop()
        await etcd.start()
        # By another client, before this one has come back: that is what makes it miss something.
        async with open_etcd([etcd.endpoint]) as other:
            for i in range(3):
                last = (await other.txn([], [Put("a", str(i).encode())])).revision
        await etcd.compact(last)
        try:
            found = await following
        except Compacted:
            return
        assert found[0].record is not None
        assert found[0].record.value == b"0", "it came back in time, and then it must not skip"


@pytest.mark.parametrize(
    "order", ["shared.errors, coordinator.store.etcd", "coordinator.store.etcd, shared.errors"]
)
async def test_its_library_and_google_rpc_can_be_imported_in_any_order(order: str) -> None:
    code = (
        f"import {order}, grpc_health.v1.health, google.rpc.error_details_pb2 as e; e.ErrorInfo(reason='x')"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stderr=subprocess.PIPE)
    async with asyncio.timeout(20):
        _, stderr = await process.communicate()
    assert process.returncode == 0, stderr.decode()
