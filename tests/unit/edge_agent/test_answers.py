"""A turn is answered when it is committed, before its node has written it down."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from edge_agent.instance import Instance
from edge_agent.phases import Asleep, Live
from edge_agent.records import NodeRecord, Records
from edge_agent.turns import Turn
from edge_agent.under_way import UnderWay
from shared.errors import Reason, RoostError
from shared.failpoints import VARIABLE, enable
from tests.support.eventually import eventually
from tests.unit.edge_agent.attaching import ANA, Node, node
from tests.unit.edge_agent.test_instance import KEY, Bench, bench, say

__all__ = ["bench", "node"]


@pytest.fixture
def points(tmp_path: Path) -> Iterator[Path]:
    enable({VARIABLE: str(tmp_path / "points")})
    yield tmp_path / "points"
    enable({})


class Noting(Records):
    """Notes of each version what was answered when it was written down, and what had been there."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.answered: dict[str, int] = {}
        self.notes: list[tuple[int, list[str], tuple[int, bool]]] = []

    def put(self, record: NodeRecord) -> None:
        before = self.get(record.jail_id)
        if before is not None:
            self.notes.append((record.version, list(self.answered), (before.version, before.busy)))
        super().put(record)

    async def hear(self, asked: UnderWay) -> None:
        self.answered[asked.turn.id] = (await asked.outcome()).receipt.version


async def test_a_turn_is_answered_before_it_is_written_down(bench: Bench, tmp_path: Path) -> None:
    records = Noting(tmp_path / "noting.db")
    ana = Instance(KEY, 1, "probe-ana", replace(bench.parts, records=records))
    for number in (1, 2):
        asked = UnderWay(Turn(f"t{number}", "ana", "hello"), patience=60.0)
        async with asyncio.TaskGroup() as group:
            group.create_task(records.hear(asked))
            group.create_task(ana.turn(asked))
    assert records.answered == {"t1": 1, "t2": 2}
    # Until then a daemon that starts anew finds it in the middle of a turn.
    assert records.notes == [(1, ["t1"], (0, True)), (2, ["t1", "t2"], (1, True))]
    written = records.get("probe-ana")
    assert written is not None
    assert (written.version, written.busy) == (2, False)
    records.close()


class _Thaw:
    """One that waits until it is let."""

    def __init__(self, thaw: Callable[[], Awaitable[None]]) -> None:
        self.let = asyncio.Event()
        self._thaw = thaw

    async def __call__(self) -> None:
        await self.let.wait()
        await self._thaw()


async def test_the_next_turn_waits_for_the_thaw_and_says_nothing_of_it(bench: Bench, node: Node) -> None:
    ana, ben = node.client(), node.client()
    await ana.ask("one")
    (jail,) = bench.jails.running.values()
    thaw = jail.thaw = _Thaw(jail.thaw)  # type: ignore[method-assign]
    assert await ana.ask("two") == "=one,two"
    instance = node.supervisor._instances[ANA]
    assert instance.busy
    ana.send("three")
    await eventually(lambda: instance._queued == 2, 10.0)
    ben.send("four")
    assert (await ben.read()).waiting.text == "another turn is under way", "three is before it"
    assert node.agents.begun == ["one", "two"]
    thaw.let.set()
    assert await ana.said() == ["~one,two,three", "=one,two,three"], "nobody else was before it"
    assert (await ben.said())[-1] == "=one,two,three,four"


async def test_a_turn_that_is_answered_takes_no_place_in_the_queue(bench: Bench) -> None:
    ana = bench.instance()
    await say(ana, "one")
    (jail,) = bench.jails.running.values()
    thaw = jail.thaw = _Thaw(jail.thaw)  # type: ignore[method-assign]
    asked = UnderWay(Turn("two", "ana", "two"))
    turns = [asyncio.create_task(ana.turn(asked))]
    assert (await asked.outcome()).reply == "one,two"
    turns += [asyncio.create_task(say(ana, f"m{i}")) for i in range(16)]
    await eventually(lambda: ana._queued == 17, 10.0)
    with pytest.raises(RoostError) as caught:
        await say(ana, "one too many")
    assert caught.value.reason is Reason.DEADLINE
    thaw.let.set()
    await asyncio.gather(*turns)
    assert bench.control.owned[KEY].version == 18


@pytest.mark.parametrize("point", ["node.commit.told", "node.commit.recorded"])
async def test_what_fails_after_the_answer_ends_the_process_and_nothing_else(
    bench: Bench, node: Node, points: Path, point: str
) -> None:
    ana = node.client()
    await ana.ask("one")
    (points / point).write_text("raise NODE_FAILED")
    assert await ana.ask("two") == "=one,two"
    assert ana.receipt.durable
    instance = node.supervisor._instances[ANA]
    await eventually(lambda: not instance.busy, 10.0)
    assert isinstance(instance.state, Asleep)
    assert not bench.jails.running
    assert await ana.ask("two") == "=one,two"
    assert ana.receipt.replayed
    assert await ana.ask("three") == "=one,two,three"
    assert bench.control.commits == ["one", "two", "three"]


async def test_a_daemon_that_stops_writes_down_what_it_has_answered(bench: Bench, node: Node) -> None:
    ana = node.client()
    assert await ana.ask("one") == "=one"
    await node.supervisor.finish_turns(10.0)
    assert isinstance(node.supervisor._instances[ANA].state, Live)
    (held,) = bench.parts.records.held()
    record = bench.parts.records.get(held.jail_id)
    assert record is not None
    assert (record.version, record.busy) == (1, False)
