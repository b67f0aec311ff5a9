"""Calls of a turn: what the agent is told, what the journal holds, and what comes of the turn."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from edge_agent.effects import Ambiguous, Effects, Known, Make, Other, TurnCalls, decide, key_of
from shared.effects import MAX_CALLS, MAX_RESULT, MAX_UNFINISHED, Call, CallState, Repeat
from shared.errors import Reason, RoostError
from shared.timers import Setting
from tests.support.calls import KEY, Ended, calls_of
from tests.support.eventually import eventually
from tests.support.fake_control import FakeControl, Owned


def call(number: int = 0, repeat: str = "never", name: str = "pay", **changes: Any) -> Call:
    return replace(Call(number, name, "a1", Repeat(repeat), CallState.BEGUN), **changes)


# --- what a call calls for -----------------------------------------------------------------------


@pytest.mark.parametrize("repeat", ["keyed", "never"])
@pytest.mark.parametrize("state", CallState)
def test_what_is_made_of_what_the_journal_says(repeat: str, state: CallState) -> None:
    recorded = call(repeat=repeat, state=state, result="1", epoch=1, revision=7)
    step = decide(recorded, call(repeat=repeat))
    match state:
        case CallState.DONE | CallState.FAILED:
            assert step == Known(recorded)
        case CallState.NOT_MADE:
            assert step == Make(7)
        case CallState.BEGUN if repeat == "keyed":
            assert step == Make(7)
        case _:
            assert step == Ambiguous(recorded)


@pytest.mark.parametrize(
    "other",
    [call(name="refund"), call(arguments="b2"), call(0, "keyed")],
    ids=["name", "args", "repeat"],
)
def test_another_call_in_its_place_is_noticed(other: Call) -> None:
    assert decide(call(state=CallState.DONE, result="1"), other) == Other(
        call(state=CallState.DONE, result="1")
    )


def test_a_key_is_of_one_call_of_one_turn_of_one_instance() -> None:
    one = key_of(KEY, "t1", call())
    assert one == key_of(KEY, "t1", call(epoch=3, revision=9))
    others = [key_of(KEY, "t2", call()), key_of(KEY, "t1", call(1)), key_of(KEY, "t1", call(name="x"))]
    others.append(key_of(replace(KEY, user="ben"), "t1", call()))
    assert len({one, *others}) == 5


# --- a turn --------------------------------------------------------------------------------------


@dataclass
class Run:
    """One run of turn t1, whose agent hears what `told` gets."""

    control: FakeControl
    calls: TurnCalls
    told: list[dict[str, Any]]
    jail: Ended
    takes: int = 0

    def call(self, number: int = 0, repeat: str = "never", name: str = "pay", arguments: str = "a1") -> None:
        message = {"kind": "call", "call": number, "name": name, "arguments": arguments, "repeat": repeat}
        self.calls.take(message)

    def done(self, number: int = 0, **how: Any) -> None:
        self.calls.take({"kind": "done", "call": number, **how})

    async def hears(self) -> dict[str, Any]:
        """The next thing that the agent is told."""
        await eventually(lambda: len(self.told) > self.takes, 5.0, "an answer")
        self.takes += 1
        return self.told[self.takes - 1]

    async def makes(self, number: int = 0, repeat: str = "never", **result: Any) -> dict[str, Any]:
        self.call(number, repeat)
        assert "key" in await self.hears()
        self.done(number, **(result or {"result": number}))
        return await self.hears() if repeat != "safe" else {}


@dataclass
class Bench:
    control: FakeControl = field(default_factory=lambda: FakeControl({KEY: Owned(epoch=1)}))

    def run(self) -> Run:
        """Of the turn t1, which finds what earlier ones left."""
        told: list[dict[str, Any]] = []
        jail = Ended()
        recorded = [c for _, c in sorted(self.control.journals.get("t1", {}).items())]
        return Run(self.control, calls_of(self.control, told, jail, recorded), told, jail)

    @property
    def journal(self) -> dict[int, tuple[str, str]]:
        return {n: (c.state.value, c.result) for n, c in self.control.journals.get("t1", {}).items()}


@pytest.fixture
def bench() -> Bench:
    return Bench()


async def failing(run: Run, speak: Callable[[Run], Any]) -> RoostError:
    async def speaking() -> str:
        reply = await speak(run)
        return reply if isinstance(reply, str) else "ok"

    with pytest.raises(RoostError) as caught:
        await run.calls.around(speaking())
    return caught.value


async def replying(run: Run, speak: Callable[[Run], Any]) -> str:
    async def speaking() -> str:
        await speak(run)
        return "ok"

    return await run.calls.around(speaking())


def error(reason: Reason = Reason.AGENT_CRASHED) -> RoostError:
    return RoostError(reason, "killed by signal 9")


async def test_a_call_begins_when_it_is_durable_and_the_turn_goes_on_when_its_end_is(bench: Bench) -> None:
    async def speak(run: Run) -> None:
        run.call()
        assert not run.told, "nothing is durable yet"
        assert await run.hears() == {"kind": "called", "id": "t1", "call": 0, "key": ""}
        assert bench.journal == {0: ("begun", "")}
        run.done(result={"id": 5})
        assert await run.hears() == {"kind": "kept", "id": "t1", "call": 0, "result": {"id": 5}}
        assert bench.journal == {0: ("done", '{"id":5}')}

    run = bench.run()
    assert await replying(run, speak) == "ok"
    assert run.calls.beside().calls == 1


async def test_a_second_run_makes_no_call_whose_end_is_known(bench: Bench) -> None:
    async def first(run: Run) -> None:
        await run.makes(0, "never")
        await run.makes(1, "keyed", failed="ValueError: no")
        raise error()

    assert (await failing(bench.run(), first)).reason is Reason.AGENT_CRASHED
    written = bench.control.writes

    async def second(run: Run) -> None:
        run.call(0)
        assert (await run.hears())["result"] == 0
        run.call(1, "keyed")
        assert (await run.hears())["failed"] == "ValueError: no"

    again = bench.run()
    assert await replying(again, second) == "ok"
    assert bench.control.writes == written
    assert again.calls.beside().calls == 2


async def test_a_keyed_call_without_an_end_is_made_again_with_the_same_key(bench: Bench) -> None:
    keys = []

    async def cut_off(run: Run) -> None:
        run.call(0, "keyed")
        keys.append((await run.hears())["key"])
        raise error()

    for _ in range(3):
        assert (await failing(bench.run(), cut_off)).reason is Reason.AGENT_CRASHED
    assert len(set(keys)) == 1
    assert len(keys[0]) == 32

    async def whole(run: Run) -> None:
        await run.makes(0, "keyed")

    assert await replying(bench.run(), whole) == "ok"


async def test_a_never_call_that_is_cut_off_is_uncertain_until_somebody_says(bench: Bench) -> None:
    async def cut_off(run: Run) -> None:
        run.call()
        await run.hears()
        raise error()

    failed = await failing(bench.run(), cut_off)
    assert failed.reason is Reason.EFFECT_UNCERTAIN
    assert "'pay' of turn t1 was made (killed by signal 9)" in failed.message
    assert "roost effects probe --user ana --resolve t1:0 done" in failed.hint
    assert bench.journal == {0: ("uncertain", "")}

    async def again(run: Run) -> str:
        run.call()
        assert (await run.hears())["error"]["reason"] == "EFFECT_UNCERTAIN"
        return "the agent made the best of it"

    assert (await failing(bench.run(), again)).reason is Reason.EFFECT_UNCERTAIN
    journal = bench.control.journals["t1"]
    journal[0] = replace(journal[0], state=CallState.NOT_MADE)

    async def made(run: Run) -> None:
        await run.makes()

    assert await replying(bench.run(), made) == "ok"


async def test_a_run_after_the_death_of_the_node_notes_what_is_uncertain(bench: Bench) -> None:
    bench.control.journals["t1"] = {0: call(epoch=1, revision=1)}

    async def speak(run: Run) -> None:
        run.call()
        assert (await run.hears())["error"]["reason"] == "EFFECT_UNCERTAIN"
        raise error(Reason.TURN_FAILED)

    assert (await failing(bench.run(), speak)).reason is Reason.EFFECT_UNCERTAIN
    assert bench.journal == {0: ("uncertain", "")}


async def test_an_end_that_was_told_is_kept_though_the_agent_died_before_it_was_durable(bench: Bench) -> None:
    async def speak(run: Run) -> None:
        run.call()
        await run.hears()
        run.done(result="paid")
        raise error()

    assert (await failing(bench.run(), speak)).reason is Reason.AGENT_CRASHED
    assert bench.journal == {0: ("done", '"paid"')}


@pytest.mark.parametrize("lost", [0, 1])
async def test_answers_that_are_lost_change_nothing(bench: Bench, lost: int) -> None:
    async def speak(run: Run) -> None:
        bench.control.lost_answers = 1 if lost == 0 else 0
        run.call()
        await run.hears()
        bench.control.lost_answers = 1 if lost == 1 else 0
        run.done(result=1)
        await run.hears()

    assert await replying(bench.run(), speak) == "ok"
    assert bench.journal == {0: ("done", "1")}


async def test_who_lost_the_instance_begins_nothing(bench: Bench) -> None:
    async def speak(run: Run) -> None:
        bench.control.owned[KEY] = Owned(epoch=2)
        run.call()
        await run.jail.killed.wait()
        raise error()

    run = bench.run()
    assert (await failing(run, speak)).reason is Reason.EPOCH_STALE
    assert not run.told
    assert not bench.journal


async def test_who_lost_the_instance_in_a_never_call_leaves_it_to_the_next_owner(bench: Bench) -> None:
    async def speak(run: Run) -> None:
        run.call()
        await run.hears()
        bench.control.owned[KEY] = Owned(epoch=2)
        raise error()

    assert (await failing(bench.run(), speak)).reason is Reason.EPOCH_STALE
    assert bench.journal == {0: ("begun", "")}


async def test_results_of_safe_calls_travel_with_the_next_that_is_recorded(bench: Bench) -> None:
    async def first(run: Run) -> None:
        await run.makes(0, "safe", result="plan")
        await run.makes(1, "safe", result="x" * (MAX_RESULT + 1))
        assert not bench.journal
        run.call(2)
        await run.hears()
        assert bench.journal[0] == ("done", '"plan"')
        assert bench.journal[1][0] == "failed", "it can't be kept"
        run.done(2, result=None)
        await run.hears()
        await run.makes(3, "safe")
        raise error()

    assert (await failing(bench.run(), first)).reason is Reason.AGENT_CRASHED
    assert sorted(bench.journal) == [0, 1, 2]

    async def second(run: Run) -> None:
        run.call(0, "safe")
        assert (await run.hears())["result"] == "plan"
        run.call(1, "safe")
        assert "at most" in (await run.hears())["failed"]
        run.call(2)
        assert (await run.hears())["result"] is None

    assert await replying(bench.run(), second) == "ok"


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ({"number": 0, "name": "refund"}, "now it is 'refund'"),
        ({"number": 0, "arguments": "b2"}, "now it has other arguments"),
        (None, "now it is not made"),
    ],
)
async def test_a_run_that_makes_other_calls_is_refused(
    bench: Bench, made: dict[str, Any] | None, said: str
) -> None:
    bench.control.journals["t1"] = {0: call(state=CallState.DONE, result="1", revision=1)}

    async def speak(run: Run) -> None:
        if made is not None:
            run.call(**made)
            assert (await run.hears())["error"]["reason"] == "EFFECT_MISMATCH"

    failed = await failing(bench.run(), speak)
    assert failed.reason is Reason.EFFECT_MISMATCH
    assert said in failed.message
    assert bench.journal == {0: ("done", "1")}


async def test_a_reply_while_a_call_is_under_way_is_none(bench: Bench) -> None:
    async def speak(run: Run) -> None:
        run.call(0, "keyed")
        await run.hears()

    assert (await failing(bench.run(), speak)).reason is Reason.TURN_FAILED

    async def never(run: Run) -> None:
        run.call(1)
        await run.hears()

    other = Bench()
    assert (await failing(other.run(), never)).reason is Reason.EFFECT_UNCERTAIN


async def test_too_many_calls_and_too_large_results(bench: Bench) -> None:
    async def speak(run: Run) -> None:
        run.call(MAX_CALLS)
        assert (await run.hears())["error"]["reason"] == "EFFECT_LIMIT"
        assert "at most 65536" in (await run.makes(0, result="x" * MAX_RESULT))["failed"]
        most = "x" * (MAX_RESULT - 2)
        ends = [await run.makes(n, "keyed", result=most) for n in range(1, 10)]
        assert ["failed" in end for end in ends] == [False] * 3 + [True] * 6

    assert await replying(bench.run(), speak) == "ok"


@pytest.mark.parametrize(
    "message",
    [
        {"kind": "call"},
        {"kind": "call", "call": -1, "name": "a", "arguments": "a", "repeat": "safe"},
        {"kind": "call", "call": True, "name": "a", "arguments": "a", "repeat": "safe"},
        {"kind": "call", "call": 0, "name": "", "arguments": "a", "repeat": "safe"},
        {"kind": "call", "call": 0, "name": "a\n", "arguments": "a", "repeat": "safe"},
        {"kind": "call", "call": 0, "name": "a", "arguments": "a/b", "repeat": "safe"},
        {"kind": "call", "call": 0, "name": "a", "arguments": "a", "repeat": "maybe"},
        {"kind": "call", "call": 5, "name": "a", "arguments": "a", "repeat": "safe"},
        {"kind": "done", "call": 0, "result": 1},
        {"kind": "done", "call": 5},
        {"kind": "done", "call": 6, "result": 1},
    ],
)
async def test_what_can_not_be_followed_breaks_the_protocol(bench: Bench, message: dict[str, Any]) -> None:
    run = bench.run()
    run.call(5, "safe")
    run.call(6)  # that is not durable yet
    with pytest.raises(RoostError) as caught:
        run.calls.take(message)
    assert caught.value.reason is Reason.BAD_REQUEST

    async def speak(run: Run) -> None:
        raise error()

    await failing(run, speak)


async def test_turns_of_which_nobody_said_what_became_are_not_joined_by_more(bench: Bench) -> None:
    effects = Effects(KEY, 1, bench.control)
    told: list[dict[str, Any]] = []
    for most, refused in ((MAX_UNFINISHED, False), (MAX_UNFINISHED + 1, True)):
        effects.woken([f"u{n}" for n in range(most)])
        tell = lambda answer: told.append(json.loads(answer))  # noqa: E731
        calls = await effects.of_turn("t1", "", Ended(), tell)  # type: ignore[arg-type]
        calls.take({"kind": "call", "call": 0, "name": "a", "arguments": "a", "repeat": "safe"})
        assert ("error" in told[-1]) is refused


# --- timers --------------------------------------------------------------------------------------


async def test_timers_count_with_the_turns_end_and_the_last_word_on_a_name(bench: Bench) -> None:
    async def speak(run: Run) -> None:
        for more in ({"after": 5}, {"at": 1e9}, {"cancel": True}):
            for name in ("a", "b") if "cancel" not in more else ("a",):
                run.calls.take({"kind": "timer", "name": name, "message": "hi", **more})

    run = bench.run()
    assert await replying(run, speak) == "ok"
    beside = run.calls.beside()
    assert (beside.timers, beside.cancelled) == ((Setting("b", "hi", at=1e9),), ("a",))


@pytest.mark.parametrize(
    "message",
    [
        {"name": "a", "message": "x"},
        {"name": "a", "after": 5},
        {"name": "", "message": "x", "after": 5},
        {"name": "a", "message": "x", "after": float("inf")},
        {"name": "a", "message": "x", "at": 10**400},
        {"name": "a", "message": "x" * 5000, "after": 5},
        {"name": "a", "cancel": False},
    ],
)
def test_timers_that_can_not_be_break_the_protocol(bench: Bench, message: dict[str, Any]) -> None:
    with pytest.raises(RoostError) as caught:
        bench.run().calls.take({"kind": "timer", **message})
    assert caught.value.reason is Reason.BAD_REQUEST
