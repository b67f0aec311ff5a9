"""One instance's life, with every part but the instance itself a fake: no process, no network, no waiting."""

from __future__ import annotations

import asyncio
import errno
import json
import os
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from edge_agent.commits import Commits
from edge_agent.control import Agent
from edge_agent.instance import Instance
from edge_agent.packages import Packages
from edge_agent.phases import Asleep, Done, Live, Lost, Parts
from edge_agent.pool import PAUSE
from edge_agent.records import Records
from edge_agent.reservations import Reservations
from edge_agent.starts import Starts
from edge_agent.state.blobs import MemoryBlobs
from edge_agent.state.bundles import BundleStore
from edge_agent.state.chunks import ChunkStore
from edge_agent.state.files import Entry
from edge_agent.state.store import StateStore
from edge_agent.tasks import Tasks
from edge_agent.tenure import Tenure
from edge_agent.turns import Turn
from edge_agent.under_way import UnderWay
from protos.v1 import common_pb2
from shared.content import Blob
from shared.errors import Reason, RoostError
from shared.identity import InstanceKey
from shared.resources import Resources
from tests.support.egress import no_egress
from tests.support.eventually import eventually
from tests.support.fake_control import AGENT, POLICY, FakeControl, Owned
from tests.support.fake_jails import AgentExit, FakeAgent, FakeJails, FakeTask

KEY = InstanceKey("default", "probe", "ana")
CAPACITY = Resources(1 << 30, 8000, 1000)
POLICY_NEED = AGENT.policy.need


async def program(agent: FakeAgent) -> None:
    """Appends each message as a line to a file, and replies with all of them."""
    await agent.send(b'{"kind": "ready"}')
    while True:
        turn = json.loads(await agent.receive())
        lines = agent.state / "lines"
        with lines.open("a") as f:
            f.write(turn["message"] + "\n")
        match turn["message"].split():
            case ["hang"]:
                await agent.hang()
            case ["task", what]:
                run = {"kind": "run", "id": turn["id"], "task": "1", "argv": [what]}
                await agent.send(json.dumps(run).encode())
                result = json.loads(await agent.receive())
                answer = {"kind": "reply", "id": turn["id"], "text": str(result.get("code", result))}
            case ["much"]:
                (agent.state / "much").write_bytes(bytes((2 << 20) - 4096))
                answer = {"kind": "reply", "id": turn["id"], "text": "ok"}
            case ["exit"]:
                raise AgentExit(7)
            case ["fail"]:
                answer = {"kind": "error", "id": turn["id"], "message": "told to"}
            case _:
                answer = {"kind": "reply", "id": turn["id"], "text": ",".join(lines.read_text().split())}
        await agent.send(json.dumps(answer).encode())
        if turn["message"] == "leave":
            return


async def program_with_much(agent: FakeAgent) -> None:
    (agent.state / "much").write_bytes(bytes((2 << 20) - 4096))
    await program(agent)


async def program_with_noise(agent: FakeAgent) -> None:
    (agent.state / "noise").write_bytes(os.urandom(256 << 10))
    await program(agent)


async def task_program(task: FakeTask) -> int:
    (task.state / "secret").write_text("of the task")
    if task.spec.argv == ("hang",):
        await asyncio.Event().wait()
    return 5


class Chunks(ChunkStore):
    """A disk that can be full."""

    full = False

    def put(self, blob: Blob) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().put(blob)

    def note(self, blobs: Sequence[Blob]) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().note(blobs)


@dataclass
class Bench:
    parts: Parts
    control: FakeControl
    jails: FakeJails
    blobs: MemoryBlobs
    chunks: Chunks
    now: list[float]

    def instance(self, epoch: int = 1) -> Instance:
        return Instance(KEY, epoch, "probe-ana", self.parts)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    now = [0.0]
    control = FakeControl({KEY: Owned(epoch=1)})
    jails = FakeJails(tmp_path / "jails", program, task_program)
    blobs = MemoryBlobs()
    chunks = Chunks(tmp_path / "chunks")
    bundles = BundleStore(tmp_path / "bundles", chunks, blobs)
    (tmp_path / "bundles" / AGENT.version).mkdir(parents=True)
    state = StateStore(chunks, blobs, bundles)
    tenure = Tenure()
    tenure.welcomed(0.0, 1e9)
    records = Records(tmp_path / "records.db")
    reservations = Reservations("edge-1", CAPACITY)
    egress = no_egress()
    parts = Parts(
        "edge-1",
        jails,
        state,
        records,
        control,
        Commits(state, control, upload_seconds=0.1, commit_seconds=0.1),
        reservations,
        tenure,
        lambda: now[0],
        Starts(jails, reservations, egress, lambda: now[0]),
        Tasks(jails, reservations, tenure, lambda: now[0]),
        egress,
        Packages(jails, tmp_path / "bundles", tmp_path / "packages"),
    )
    yield Bench(parts, control, jails, blobs, chunks, now)
    await jails.close()
    records.close()


async def say(instance: Instance, message: str, id: str = "") -> Done:
    return await instance.turn(UnderWay(Turn(id or message, "ana", message)))


async def refused(instance: Instance, message: str, id: str = "") -> Reason:
    with pytest.raises(RoostError) as caught:
        await say(instance, message, id)
    return caught.value.reason


async def test_a_first_turn_then_a_second(bench: Bench) -> None:
    ana = bench.instance()
    first = await say(ana, "one")
    assert (first.reply, first.receipt.version) == ("one", 1)
    assert first.receipt.resumed_from == common_pb2.NEW
    second = await say(ana, "two")
    assert (second.reply, second.receipt.version, second.receipt.resumed_version) == ("one,two", 2, 1)
    assert second.receipt.resumed_from == common_pb2.LIVE
    assert bench.control.owned[KEY].version == 2


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("fail", Reason.TURN_FAILED),
        ("exit", Reason.AGENT_CRASHED),
        ("hang", Reason.TURN_TIMEOUT),
    ],
)
async def test_a_turn_that_fails_leaves_no_trace(bench: Bench, message: str, reason: Reason) -> None:
    ana = bench.instance()
    await say(ana, "one")
    assert await refused(ana, message) is reason
    assert isinstance(ana.state, Asleep)
    assert not bench.jails.running
    assert bench.parts.reservations.total(0.0) == Resources()
    again = await say(ana, "two")
    assert again.reply == "one,two"
    assert again.receipt.resumed_from == common_pb2.DISK


async def test_the_same_turn_again_is_answered_from_the_record(bench: Bench) -> None:
    ana = bench.instance()
    await say(ana, "one", "t1")
    await say(ana, "two", "t2")
    again = await say(ana, "one", "t1")
    assert (again.reply, again.receipt.replayed, again.receipt.version) == ("one", True, 2)
    # Also when nothing runs: then no jail is made for it.
    await ana._sleep()
    assert (await say(ana, "one", "t1")).receipt.replayed
    assert not bench.jails.running
    assert bench.control.commits == ["t1", "t2"]


async def test_an_agent_that_ends_between_turns_is_started_again(bench: Bench) -> None:
    ana = bench.instance()
    await say(ana, "one")
    bench.jails.running["probe-ana"].crash(0)
    assert (await say(ana, "two")).reply == "one,two"
    assert await refused(ana, "leave") is Reason.AGENT_CRASHED  # before what it did could be committed
    assert (await say(ana, "three")).reply == "one,two,three"


async def test_a_commit_whose_answer_is_lost_is_applied_once(bench: Bench) -> None:
    ana = bench.instance()
    bench.control.lost_answers = 1
    assert (await say(ana, "one")).receipt.version == 1
    assert bench.control.commits == ["one"]


async def test_no_coordinator_means_not_committed_and_then_exactly_once(bench: Bench) -> None:
    ana = bench.instance()
    await say(ana, "one")
    bench.control.lost_answers = 99  # it is applied each time, and each answer is lost
    assert await refused(ana, "two", "t2") is Reason.TURN_NOT_COMMITTED
    assert not bench.jails.running
    bench.control.lost_answers = 0
    again = await say(ana, "two", "t2")
    assert (again.reply, again.receipt.replayed, again.receipt.version) == ("one,two", True, 2)
    bench.blobs.down = True
    bench.control.takes_inline = False  # nothing is applied
    assert await refused(ana, "three", "t3") is Reason.TURN_NOT_COMMITTED
    bench.blobs.down = False
    again = await say(ana, "three", "t3")
    assert (again.reply, again.receipt.replayed) == ("one,two,three", False)


async def test_a_small_turn_needs_no_blob_store_and_can_be_resumed_from_its_commit_alone(
    bench: Bench, tmp_path: Path
) -> None:
    bench.blobs.down = True
    ana = bench.instance()
    assert (await say(ana, "one")).receipt.version == 1
    assert (await say(ana, "two")).reply == "one,two"
    bench.blobs.down = False
    assert not bench.blobs.kept
    nothing_here = ChunkStore(tmp_path / "elsewhere")
    state = replace(bench.parts.state, chunks=nothing_here)
    bench.control.owned[KEY] = replace(bench.control.owned[KEY], epoch=2)
    parts = replace(bench.parts, state=state, commits=replace(bench.parts.commits, state=state))
    elsewhere = Instance(KEY, 2, "probe-elsewhere", parts)
    assert (await say(elsewhere, "three")).reply == "one,two,three"


async def test_what_a_commit_brought_along_and_is_lost_means_refusal(bench: Bench) -> None:
    """Never an empty agent."""
    ana = bench.instance()
    await say(ana, "one")
    await ana.hibernate_if_idle(0.0, 0.0)
    bench.control.inline.clear()
    bench.chunks.settle()
    for chunk in (bench.chunks._directory).glob("*/*"):
        chunk.unlink()
    assert await refused(ana, "two") is Reason.RESTORE_INCOMPLETE
    assert not bench.jails.running


async def test_a_coordinator_that_takes_nothing_along_gets_the_commit_by_the_blob_store(bench: Bench) -> None:
    bench.control.takes_inline = False
    ana = bench.instance()
    assert (await say(ana, "one")).receipt.version == 1
    assert bench.control.owned[KEY].root in bench.blobs.kept
    assert not bench.control.inline[KEY]


async def test_what_is_not_little_goes_to_the_blob_store(bench: Bench) -> None:
    bench.jails.program = program_with_noise
    ana = bench.instance()
    await say(ana, "one")
    assert bench.control.owned[KEY].root in bench.blobs.kept
    assert not bench.control.inline[KEY]


async def test_a_slow_upload_does_not_eat_the_time_of_the_commit(bench: Bench) -> None:
    commits = Commits(bench.parts.state, bench.control, upload_seconds=0.3, commit_seconds=0.3)
    ana = Instance(KEY, 1, "probe-ana", replace(bench.parts, commits=commits))
    puts = bench.blobs.put

    async def slow(blobs: Iterable[Blob]) -> None:
        await asyncio.sleep(0.25)
        await puts(blobs)

    bench.blobs.put = slow  # type: ignore[method-assign]
    bench.control.takes_inline = False
    bench.control.lost_answers = 1  # the commit needs a second try, for which there is time
    assert (await say(ana, "one")).receipt.version == 1


async def test_a_replay_leaves_no_room_taken(bench: Bench) -> None:
    await say(bench.instance(), "one", "t1")
    elsewhere = bench.instance()  # as on a node to which it was moved after its commit
    bench.control.asleep.discard(KEY)
    assert (await say(elsewhere, "one", "t1")).receipt.replayed
    assert not elsewhere.forgettable
    await elsewhere.tell()
    assert bench.control.asleep == {KEY}
    assert elsewhere.forgettable


async def test_a_node_that_can_not_write_down_a_committed_turn_still_says_it(bench: Bench) -> None:
    ana = bench.instance()
    await say(ana, "one")
    bench.parts.records._db.execute(
        "CREATE TRIGGER full BEFORE INSERT ON instances BEGIN SELECT RAISE(FAIL, 'full'); END"
    )
    second = await say(ana, "two")
    assert (second.reply, second.receipt.version) == ("one,two", 2)
    assert not bench.jails.running
    bench.parts.records._db.execute("DROP TRIGGER full")
    assert (await say(ana, "three")).reply == "one,two,three"


async def test_a_full_disk_fails_the_turn_and_nothing_else(bench: Bench) -> None:
    ana = bench.instance()
    await say(ana, "one")
    bench.chunks.full = True
    assert await refused(ana, "two", "t2") is Reason.NODE_FAILED
    assert bench.control.owned[KEY].version == 1
    assert not bench.jails.running
    bench.chunks.full = False
    assert (await say(ana, "two", "t2")).reply == "one,two"


async def test_a_state_that_is_more_than_it_may_be_is_not_committed(bench: Bench) -> None:
    ana = bench.instance()
    bench.control.agent = Agent.of("v1", POLICY + '[resources]\ndisk = "1M"\n', "0" * 64)
    await say(ana, "one")
    (bench.jails.directory / "probe-ana" / "big").write_bytes(bytes(2 << 20))
    assert await refused(ana, "two") is Reason.STATE_TOO_LARGE
    assert (await say(ana, "three")).reply == "one,three"


async def test_a_version_that_may_have_less_than_there_is_is_not_started(bench: Bench) -> None:
    ana = bench.instance()
    (bench.jails.directory / "probe-ana").mkdir(parents=True)
    bench.jails.program = program_with_much
    await say(ana, "one")
    await ana._sleep()
    bench.control.agent = Agent.of("v1", POLICY + '[resources]\ndisk = "1M"\n', "0" * 64)
    with pytest.raises(RoostError, match=r"takes 2M.*may have 1M") as caught:
        await say(ana, "two")
    assert (caught.value.reason, "resources.disk" in caught.value.hint) == (Reason.STATE_TOO_LARGE, True)
    assert not bench.jails.running


BIG = Resources(512 << 20, 2000, 100)


async def test_it_is_resized_in_the_middle_of_a_turn_and_goes_on(bench: Bench) -> None:
    ana = bench.instance()
    assert not await ana.resize(BIG), "nothing runs"
    await say(ana, "one")
    turn = asyncio.create_task(refused(ana, "hang"))
    await eventually(lambda: ana.busy, 5.0, "it is at it")
    assert await ana.resize(BIG)
    assert bench.jails.running["probe-ana"].limits == BIG
    assert bench.parts.reservations.total(0.0) == BIG
    turn.cancel()


async def test_a_size_for_which_there_is_no_room_changes_nothing(bench: Bench) -> None:
    ana = bench.instance()
    await say(ana, "one")
    before = bench.parts.reservations.total(0.0)
    for size, reason in (
        (Resources(2 << 30, 1, 9), Reason.NODE_FULL),
        (Resources(1, 1, 9), Reason.JAIL_FAILED),
    ):
        with pytest.raises(RoostError) as caught:
            await ana.resize(size)
        assert caught.value.reason is reason
        assert bench.parts.reservations.total(0.0) == before
        assert bench.jails.running["probe-ana"].limits == before


async def test_it_wakes_in_its_own_size_and_a_restarted_node_knows_it(bench: Bench) -> None:
    bench.control.size = BIG
    ana = bench.instance()
    await say(ana, "one")
    jail = bench.jails.running["probe-ana"]
    assert (jail.limits, bench.parts.reservations.total(0.0)) == (BIG, BIG)
    record = bench.parts.records.get("probe-ana")
    assert record is not None
    bench.parts.reservations.release(KEY, 1)
    again = bench.instance()
    await again.adopt(jail, record)
    assert bench.parts.reservations.total(0.0) == BIG


async def test_too_many_waiting_turns_are_refused(bench: Bench) -> None:
    ana = bench.instance()
    results = await asyncio.gather(*(say(ana, f"m{i}") for i in range(20)), return_exceptions=True)
    refusals = [r for r in results if isinstance(r, RoostError)]
    assert [r.reason for r in refusals] == [Reason.DEADLINE] * 4
    assert bench.control.owned[KEY].version == 16


async def test_a_commit_with_an_old_epoch_kills_the_jail(bench: Bench) -> None:
    ana = bench.instance()
    await say(ana, "one")
    bench.control.owned[KEY] = Owned(epoch=2, version=1, root=bench.control.owned[KEY].root)
    assert await refused(ana, "two") is Reason.EPOCH_STALE
    assert not bench.jails.running
    assert ana.evicted
    assert await refused(ana, "two") is Reason.EPOCH_STALE
    assert bench.control.commits == ["one"]


async def test_eviction_in_the_middle_of_a_turn(bench: Bench) -> None:
    ana = bench.instance()
    await say(ana, "one")
    turn = asyncio.create_task(refused(ana, "hang"))
    for _ in range(20):
        await asyncio.sleep(0)
    await ana.evict("edge-2 owns it now")
    assert await turn is Reason.EPOCH_STALE
    assert ana.state == Lost("edge-2 owns it now")
    assert not bench.jails.running
    assert bench.parts.records.held() == []


async def test_a_task_in_a_turn_is_no_part_of_its_state(bench: Bench) -> None:
    ana = bench.instance()
    assert (await say(ana, "task short")).reply == "5"
    assert isinstance(ana.state, Live)
    assert [node.path for node in ana.state.manifest.nodes] == ["lines"]
    assert not bench.jails.tasks
    assert bench.parts.reservations.total(0.0) == ana.state.agent.policy.need


@pytest.mark.parametrize("end", ["evict", "crash", "suspend", "timeout"])
async def test_a_task_ends_with_its_instances_turn(bench: Bench, end: str) -> None:
    ana = bench.instance()
    outcome = asyncio.create_task(ana.turn(UnderWay(Turn("t1", "ana", "task hang"))))
    await eventually(lambda: len(bench.jails.tasks) == 1, timeout=5.0)
    match end:
        case "evict":
            await ana.evict("edge-2 owns it now")
            reason: Reason | None = Reason.EPOCH_STALE
        case "crash":
            bench.jails.running["probe-ana"].crash(1)
            reason = Reason.AGENT_CRASHED
        case "suspend":
            await ana.suspend("tenure")
            await eventually(lambda: not bench.jails.tasks, timeout=5.0)
            await ana.freezer.drop("tenure")
            reason = None
        case "timeout":
            reason = Reason.TURN_TIMEOUT
    if reason is None:
        assert "NODE_SUSPENDED" in (await outcome).reply, "the agent is told, and goes on"
    else:
        with pytest.raises(RoostError) as caught:
            await outcome
        assert caught.value.reason is reason
    assert not bench.jails.tasks
    assert bench.parts.reservations.total(0.0) == (Resources() if reason else POLICY_NEED)


async def test_what_another_node_committed_is_fetched(bench: Bench, tmp_path: Path) -> None:
    ana = bench.instance()
    await say(ana, "one")
    root = bench.control.owned[KEY].root
    await ana.evict("moved")
    for chunk in (tmp_path / "chunks").rglob("*"):
        if chunk.is_file():
            chunk.unlink()
    bench.control.owned[KEY] = Owned(epoch=2, version=1, root=root)
    moved = await say(bench.instance(epoch=2), "two")
    assert (moved.reply, moved.receipt.epoch, moved.receipt.version) == ("one,two", 2, 2)
    assert moved.receipt.resumed_from == common_pb2.BLOBS


async def test_what_can_not_be_restored_is_refused_and_not_forgotten(bench: Bench, tmp_path: Path) -> None:
    ana = bench.instance()
    await say(ana, "one")
    await ana.evict("moved")
    root = bench.control.owned[KEY].root
    bench.control.owned[KEY] = Owned(epoch=2, version=1, root=root)
    for chunk in (tmp_path / "chunks").rglob("*"):
        if chunk.is_file():
            chunk.unlink()
    kept = dict(bench.blobs.kept)
    for hash in kept:
        bench.blobs.kept = {h: data for h, data in kept.items() if h != hash}
        assert await refused(bench.instance(epoch=2), "two") is Reason.RESTORE_INCOMPLETE
        for chunk in (tmp_path / "chunks").rglob("*"):
            if chunk.is_file():
                chunk.unlink()
    assert not bench.jails.running
    bench.blobs.kept = kept
    assert (await say(bench.instance(epoch=2), "two")).reply == "one,two"


async def test_no_room_is_said_and_leaves_nothing(bench: Bench) -> None:
    bench.parts.reservations.claim(InstanceKey("default", "probe", "ben"), 1, CAPACITY, 0.0)
    assert await refused(bench.instance(), "one") is Reason.NODE_FULL
    assert not bench.jails.running


async def test_a_jail_that_can_not_be_made(bench: Bench) -> None:
    bench.jails.refusals.append(RoostError(Reason.JAIL_FAILED, "mount /proc: no", "ask the kernel"))
    ana = bench.instance()
    assert await refused(ana, "one") is Reason.JAIL_FAILED
    assert bench.parts.reservations.total(0.0) == Resources()
    assert (await say(ana, "one")).reply == "one"


async def test_the_idle_hibernate_and_the_coordinator_hears_of_it(bench: Bench) -> None:
    ana = bench.instance()
    await say(ana, "one")
    assert not await ana.hibernate_if_idle(9.9)
    assert await ana.hibernate_if_idle(10.0)
    assert not bench.jails.running
    bench.control.down = True
    with pytest.raises(RoostError):
        await ana.tell()
    bench.control.down = False
    await ana.tell()
    assert bench.control.asleep == {KEY}
    assert ana.forgettable
    assert (await say(ana, "two")).receipt.resumed_from == common_pb2.DISK
    assert not bench.control.asleep


async def test_a_node_out_of_touch_blames_itself_and_not_the_agent(bench: Bench) -> None:
    ana = bench.instance()
    await say(ana, "one")
    bench.now[0] = 1e9  # long past its tenure
    assert await refused(ana, "hang") is Reason.NODE_SUSPENDED


async def test_turns_are_serial(bench: Bench) -> None:
    ana = bench.instance()
    done = await asyncio.gather(*(say(ana, f"m{i}") for i in range(5)))
    assert [d.receipt.version for d in done] == [1, 2, 3, 4, 5]
    assert done[-1].reply == "m0,m1,m2,m3,m4"


async def test_a_restarted_daemon_adopts_what_was_between_turns(bench: Bench) -> None:
    await say(bench.instance(), "one")
    (jail,) = await bench.jails.adopt()
    record = bench.parts.records.get("probe-ana")
    assert record is not None
    assert not record.busy
    await jail.freeze()  # as a daemon does that is in doubt whether it still owns it
    successor = bench.instance()
    await successor.adopt(jail, record)
    assert isinstance(successor.state, Live)
    await successor.freezer.drop("tenure")
    assert not bench.jails.running["probe-ana"].frozen
    assert (await say(successor, "two")).reply == "one,two"
    turn = asyncio.create_task(refused(successor, "hang"))
    for _ in range(20):
        await asyncio.sleep(0)
    middle = bench.parts.records.get("probe-ana")
    assert middle is not None
    assert middle.busy  # a third daemon would not adopt it now
    await turn


async def test_a_new_instance_takes_a_parked_jail_and_keeps_it_if_there_is_much_in_it(bench: Bench) -> None:
    parked = await waiting_jail(bench)
    ana = bench.instance()
    first = await say(ana, "one")
    assert (first.reply, first.receipt.resumed_from) == ("one", common_pb2.NEW)
    assert ana.jail_id == parked
    record = bench.parts.records.of_key(KEY)
    assert record is not None
    assert record.jail_id == parked
    await say(ana, "much")
    bench.now[0] += 100.0
    assert await ana.hibernate_if_idle(bench.now[0])
    await waiting_jail(bench)
    again = await say(ana, "two")
    assert (again.reply, again.receipt.resumed_from) == ("one,much,two", common_pb2.DISK)
    assert ana.jail_id == parked, "its directory is there"
    assert bench.jails.made[-1].zygote, "by the zygote"


async def test_what_sleeps_lightly_wakes_in_a_parked_jail(bench: Bench) -> None:
    ana = bench.instance()
    await say(ana, "one")
    slept_in = ana.jail_id
    assert await ana.hibernate_if_idle(bench.now[0], 0.0)
    await waiting_jail(bench)
    again = await say(ana, "two")
    assert (again.reply, again.receipt.resumed_from) == ("one,two", common_pb2.DISK)
    assert "-parked-" in ana.jail_id
    record = bench.parts.records.of_key(KEY)
    assert record is not None
    assert record.jail_id == ana.jail_id
    await bench.parts.starts.reconcile()
    assert slept_in not in await bench.jails.directories()


async def test_a_parked_jail_that_fails_leaves_who_would_wake_in_it_where_it_was(bench: Bench) -> None:
    ana = bench.instance()
    await say(ana, "one")
    assert await ana.hibernate_if_idle(bench.now[0], 0.0)
    await waiting_jail(bench)

    class Broken:
        def close(self) -> None: ...

        async def scan(self) -> list[Entry]:
            raise RoostError(Reason.JAIL_FAILED, "told to")

    for jail in bench.jails.running.values():
        jail._files = Broken()  # type: ignore[assignment]
    again = await say(ana, "two")
    assert (again.reply, again.receipt.resumed_from) == ("one,two", common_pb2.DISK)
    record = bench.parts.records.of_key(KEY)
    assert record is not None
    assert record.jail_id == ana.jail_id == "probe-ana"


async def test_a_state_from_elsewhere_is_restored_into_a_parked_jail(bench: Bench) -> None:
    ana = bench.instance()
    await say(ana, "one")
    await ana.evict("moved")
    bench.control.owned[KEY] = Owned(2, bench.control.owned[KEY].version, bench.control.owned[KEY].root)
    await waiting_jail(bench)
    again = bench.instance(epoch=2)
    reply = await say(again, "two")
    assert (reply.reply, reply.receipt.resumed_from) == ("one,two", common_pb2.BLOBS)
    assert "-parked-" in again.jail_id


async def test_a_parked_jail_that_is_gone_costs_nothing_but_time(bench: Bench) -> None:
    await waiting_jail(bench)
    for jail in list(bench.jails.running.values()):
        await jail.kill()
    ana = bench.instance()
    assert (await say(ana, "one")).reply == "one"
    assert ana.jail_id == "probe-ana"
    await bench.parts.starts.reconcile()  # which notices the others that are gone
    await bench.parts.starts.reconcile()
    assert await bench.jails.directories() == ["probe-ana"]


async def test_a_zygote_that_is_gone_costs_nothing_but_time(bench: Bench) -> None:
    await waiting_jail(bench)
    ana = bench.instance()
    await say(ana, "one")
    await refused(ana, "fail")
    bench.jails.zygotes[0].kill = lambda: None  # type: ignore[method-assign,assignment]
    bench.jails.refusals.append(RoostError(Reason.JAIL_FAILED, "there is no such zygote"))
    assert (await say(ana, "two")).reply == "one,two"
    assert not bench.jails.made[-1].zygote


async def waiting_jail(bench: Bench) -> str:
    """Has one jail wait; its id."""
    before = set(bench.jails.running)
    list(bench.parts.starts.ways(AGENT, "", False))
    bench.now[0] += 2 * PAUSE
    async with asyncio.timeout(5.0):
        while not (new := [j for j in set(bench.jails.running) - before if "-parked-" in j]):
            await bench.parts.starts.reconcile()
            await asyncio.sleep(0)  # lets it act: there is no event to wait for in a pass
        if parking := [t for t in asyncio.all_tasks() if t.get_name().startswith("park")]:
            await asyncio.wait(parking)
    return new[0]
