"""Collecting beside uploads, commits, crashes and collectors that stand still, in random order.

The model is small on purpose: two instances, three chunks, two versions that are kept. After every step the
one thing that matters is asked: can every version that is kept be read in full? A variant with a planted bug
must fail the same test, or the test proves nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from coordinator.collecting.collector import Clock, Collector, Settings
from coordinator.collecting.marking import Marker
from coordinator.collecting.report import Report
from coordinator.inline import InlineCommits
from coordinator.store.memory import MemoryStore
from coordinator.trash import Condemned
from shared.content import Blob
from shared.errors import Reason, RoostError
from shared.identity import InstanceKey
from shared.manifest import FileNode, StateManifest, encode
from tests.support.fake_heap import Gate, MemoryHeap
from tests.unit.coordinator.collecting import (
    AT_ONCE,
    CHUNKS,
    KEYS,
    Run,
    Upload,
    World,
)

CHUNK = st.integers(0, len(CHUNKS) - 1)

T = TypeVar("T")


class Collecting(RuleBasedStateMachine):
    """Uploads step by step, commits, and up to two collectors step by step."""

    fenced = True
    how = AT_ONCE

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.world = World(self.fenced, self.how)
        self.uploads: list[Upload] = []
        self.runs: list[Run] = []

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(work)

    def teardown(self) -> None:
        for run in self.runs:
            run.task.cancel()
        self.do(self._gathered())
        self.loop.close()

    async def _gathered(self) -> None:
        await asyncio.gather(*(run.task for run in self.runs), return_exceptions=True)

    @initialize()
    def begin(self) -> None:
        self.do(self.world.begin())

    # --- turns -------------------------------------------------------------------------------

    @rule(who=st.sampled_from(KEYS), chunks=st.sets(CHUNK), lag=st.integers(0, 1), far=st.booleans())
    def a_turn_ends(self, who: InstanceKey, chunks: set[int], lag: int, far: bool) -> None:
        """Its node may be behind in what it knows of rounds."""
        if len(self.uploads) < 3:
            known = self.do(self.world.rounds.read())
            gc_round = max(0, (known.value.number if known else 0) - lag)
            some = [CHUNKS[i] for i in sorted(chunks)]
            self.uploads.append(self.do(self.world.upload(who, some, gc_round)))
            for _ in range(8 if far else 0):
                self.one_more_blob(len(self.uploads) - 1, True)

    @rule(who=st.sampled_from(KEYS), chunks=st.sets(CHUNK), lag=st.integers(0, 1))
    def a_turn_ends_that_changed_little(self, who: InstanceKey, chunks: set[int], lag: int) -> None:
        if len(self.uploads) < 3:
            known = self.do(self.world.rounds.read())
            gc_round = max(0, (known.value.number if known else 0) - lag)
            some = [CHUNKS[i] for i in sorted(chunks)]
            self.uploads.append(self.do(self.world.upload(who, some, gc_round, little=True)))

    @rule()
    def what_commits_brought_along_is_brought_on(self) -> None:
        self.do(self.world.bring_on())

    @rule(who=st.sampled_from(KEYS))
    def whoever_brings_it_on_dies_before_it_is_deleted(self, who: InstanceKey) -> None:
        along = self.do(self.world.inline.of(who))
        self.do(self.world.heap.put_all([Blob.verified(blob.hash, blob.zstd) for blob in along]))

    @rule(chunk=CHUNK)
    def an_upload_was_given_up(self, chunk: int) -> None:
        self.do(self.world.heap.put_all([CHUNKS[chunk]]))

    @rule(which=st.integers(0, 2), asks=st.booleans())
    def a_blob_is_asked_for_or_put(self, which: int, asks: bool) -> None:
        self.one_more_blob(which, asks)

    def one_more_blob(self, which: int, asks: bool) -> None:
        if which >= len(self.uploads):
            return
        upload = self.uploads[which]
        if upload.wanted:
            blob = upload.wanted.pop()
            if not asks or not self.do(self.world.heap.has(blob.hash)):
                upload.put.append(blob)
        elif upload.put:
            self.do(self.world.heap.put_all([upload.put.pop()]))

    @rule(which=st.integers(0, 2))
    def it_is_committed(self, which: int) -> None:
        if which >= len(self.uploads):
            return
        upload = self.uploads[which]
        if upload.wanted or upload.put:
            return
        self.uploads.remove(upload)
        try:
            self.do(self.world.commit(upload))
        except RoostError as error:
            assert error.reason in (Reason.EPOCH_STALE, Reason.UPLOAD_STALE)

    # --- collecting --------------------------------------------------------------------------

    @rule(steps=st.integers(0, 12))
    def a_collector_begins(self, steps: int) -> None:
        if all(run.abandoned for run in self.runs) and len(self.runs) < 2:
            gate = Gate()
            task = self.loop.create_task(self.world.collector(gate).collect())
            self.runs.append(Run(gate, task))
            self.do(self._steps(self.runs[-1], steps))

    @rule(which=st.integers(0, 1), steps=st.sampled_from([1, 3, 100]))
    def a_collector_goes_on(self, which: int, steps: int) -> None:
        if which < len(self.runs):
            self.do(self._steps(self.runs[which], steps))

    @rule(which=st.integers(0, 1))
    def a_collector_dies(self, which: int) -> None:
        if which < len(self.runs):
            run = self.runs.pop(which)
            run.task.cancel()
            self.do(asyncio.gather(run.task, return_exceptions=True))  # type: ignore[arg-type]

    @rule()
    def a_collector_stands_still_until_its_lease_is_gone(self) -> None:
        for run in self.runs:
            run.abandoned = True
        self.world.store.advance(3600)

    @rule()
    def a_whole_round(self) -> None:
        if all(run.abandoned for run in self.runs):
            self.do(self.world.collect())

    async def _steps(self, run: Run, count: int) -> None:
        await steps(run.task, run.gate, count)
        if run.task.done():
            self.runs.remove(run)
            if error := run.task.exception():
                assert isinstance(error, RoostError), error
                late = run.abandoned and error.reason is Reason.STORE_UNAVAILABLE  # its lease has expired
                assert error.reason is Reason.COLLECTING or late, error
            else:
                assert run.task.result().missing == 0

    @invariant()
    def what_is_kept_can_be_read(self) -> None:
        lost = self.do(self.world.lost())
        assert not lost, lost


class NoCommitIsEverTooLate(Collecting):
    """Planted: collecting takes no notice of commits under way; they may rely on what was seen ages ago."""

    fenced = False


QUICK = settings(
    max_examples=30, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
)


def test_nothing_that_is_kept_is_ever_lost() -> None:
    run_state_machine_as_test(Collecting, settings=QUICK)


def test_planted_commits_that_are_never_too_late_are_caught_by_the_same_test() -> None:
    many = settings(
        QUICK, max_examples=300, stateful_step_count=90, derandomize=True, phases=[Phase.generate]
    )
    with pytest.raises(AssertionError, match="acme/chef"):  # what of is lost
        run_state_machine_as_test(NoCommitIsEverTooLate, settings=many)


async def a_commit_on_its_way_for(rounds: int, before: int, fenced: bool, rules: Settings) -> list[str]:
    """What is lost when a turn relies on a blob that nobody else needs, found after `before` steps of a
    collector, and is committed only when that one is done and `rounds` more have been."""
    world = World(fenced, rules)
    await world.begin()
    await world.heap.put_all(CHUNKS[:1])
    gate = Gate()
    collecting = asyncio.create_task(world.collector(gate).collect())
    await steps(collecting, gate, before)
    known = await world.rounds.read()
    upload = await world.upload(KEYS[0], CHUNKS[:1], known.value.number if known else 0)
    for blob in upload.wanted:
        if not await world.heap.has(blob.hash):
            await world.heap.put_all([blob])
    await world.heap.put_all(upload.put)
    await steps(collecting, gate, 1000)
    for _ in range(rounds):
        await world.collect()
    try:
        await world.commit(upload)
    except RoostError as error:
        assert error.reason is Reason.UPLOAD_STALE
        assert rounds, "the very next round refuses nothing"
    with suppress(RoostError):  # a round that finds something lost says so, and ends
        for _ in range(3):
            await world.collect()
    return await world.lost()


async def steps(task: asyncio.Task[Report], gate: Gate, count: int) -> None:
    for _ in range(count):
        if task.done():
            return
        gate.let_one_pass()
        waiting = asyncio.create_task(gate.waiting.wait())
        await asyncio.wait([waiting, task], return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()


STEPS = range(20)  # of a collector in so small a world, from its beginning to its end


@pytest.mark.parametrize("rounds", range(4))
async def test_a_commit_on_its_way_loses_nothing_wherever_a_collector_is(rounds: int) -> None:
    for before in STEPS:
        assert not await a_commit_on_its_way_for(rounds, before, True, AT_ONCE), before


@pytest.mark.parametrize(
    ("fenced", "rules"), [(False, AT_ONCE), (True, Settings(grace=0.0, rate=1e9, rounds=1))]
)
async def test_planted_collecting_that_takes_no_notice_of_commits_on_their_way(
    fenced: bool, rules: Settings
) -> None:
    """Either half of it: no commit is ever too late, or a blob spends one round less in the trash."""
    lost = [await a_commit_on_its_way_for(n, before, fenced, rules) for n in range(4) for before in STEPS]
    assert any(lost)


async def test_what_a_commit_brought_along_is_needed_and_not_missing() -> None:
    world = World(True, AT_ONCE)
    await world.begin()
    upload = await world.upload(KEYS[0], CHUNKS[:2], 0, little=True)
    await world.commit(upload)
    needed = await world.marker(world.store).mark()
    assert all(blob.hash in needed for blob in upload.along)
    assert len(upload.along) == 3, "two chunks and the manifest"
    for missing_in_the_blob_store in (True, False):
        report = await world.collect()
        assert (report.missing, report.condemned) == (0, 0)
        assert missing_in_the_blob_store == (not world.heap.where(upload.along[0].hash))
        await world.bring_on()


async def test_the_parts_that_a_manifest_shares_with_the_one_before_it_stay() -> None:
    """A node puts only those that are new, and asks for none of the others."""
    world = World(True, AT_ONCE)
    await world.begin()
    chunks = [Blob.of(f"file {i}".encode()) for i in range(1000)]
    await world.heap.put_all(chunks)
    root, before, put = "", set[str](), 0
    for version in range(1, 8):
        nodes = tuple(
            FileNode(f"f{i:04}", 0o600, version * (i == 600), len(chunk.plain), (chunk.hash,))
            for i, chunk in enumerate(chunks)
        )
        manifest = StateManifest(str(KEYS[0]), 1, version, nodes, parent=root)
        encoded = encode(manifest, StateManifest(str(KEYS[0]), 1, version - 1, nodes))
        new = [Blob.of(plain) for hash, plain in encoded.blobs.items() if hash not in before]
        known = await world.rounds.read()
        await world.heap.put_all(new)
        await world.commit(Upload(KEYS[0], known.value.number if known else 0, manifest, []))
        root, before, put = encoded.root, set(encoded.blobs), put + len(new)
        for _ in range(3):
            await world.collect()
        assert not await world.lost()
    assert put < 7 * len(before), "they do share some"
    assert len(world.heap.chunks_kept) < len(chunks) + put, "what only older versions need is gone"


async def test_planted_a_collector_that_does_not_look_at_what_commits_bring_along() -> None:
    world = World(True, AT_ONCE)
    await world.begin()
    await world.commit(await world.upload(KEYS[0], CHUNKS[:1], 0, little=True))
    elsewhere = InlineCommits(MemoryStore(), world.heap, lambda: 0.0, 1.0)
    with pytest.raises(RoostError, match="nothing is collected"):
        await Marker(world.store, world.manifests, elsewhere).mark()


async def test_one_that_can_not_be_read_stops_collecting_and_is_named() -> None:
    world = World(True, AT_ONCE)
    await world.begin()
    upload = await world.upload(KEYS[0], CHUNKS[:1], 0)
    await world.heap.put_all([*upload.wanted, *upload.put])
    await world.commit(upload)
    await world.heap.put_all(CHUNKS[2:])
    root = encode(upload.manifest).root
    good = world.heap.chunks_kept[root]
    for harm in (None, b"junk"):
        if harm is None:
            del world.heap.chunks_kept[root]
        else:
            world.heap.chunks_kept[root] = harm
        with pytest.raises(RoostError, match="version 1 of acme/chef/ana"):
            await world.collect()
        assert world.heap.where(CHUNKS[2].hash) == "chunks", "nothing was touched"
    world.heap.chunks_kept[root] = good
    assert (await world.collect()).condemned == 1


async def test_after_a_restored_backup_what_knows_a_later_round_is_prepared_again() -> None:
    world = World(True, AT_ONCE)
    await world.begin()
    await world.collect()
    upload = await world.upload(KEYS[0], CHUNKS[:1], 46)
    with pytest.raises(RoostError) as caught:
        await world.commit(upload)
    assert caught.value.reason is Reason.UPLOAD_STALE


async def test_after_a_round_that_failed_a_store_that_can_not_refuse_is_given_time() -> None:
    world = World(True, AT_ONCE)
    await world.begin()
    pauses: list[float] = []

    async def pause(seconds: float) -> None:
        pauses.append(seconds)

    class CanNotRefuse(MemoryHeap):
        closes_trash = False
        broken = False

        async def condemned(self) -> list[Condemned]:
            if self.broken:
                raise RoostError(Reason.BLOBS_UNAVAILABLE, "slow down")
            return await super().condemned()

    heap = CanNotRefuse()
    heap.chunks_kept = world.heap.chunks_kept
    clock = Clock(steady=lambda: 0.0, unix=lambda: 1e9, sleep=pause)
    late = Settings(grace=0.0, rate=1e9, late=33.0)
    collector = Collector("me", world.store, heap, world.marker(world.store), world.rounds, late, clock)
    await collector.collect()
    heap.broken = True
    with pytest.raises(RoostError):
        await collector.collect()
    assert 33.0 not in pauses
    heap.broken = False
    await collector.collect()
    assert 33.0 in pauses
