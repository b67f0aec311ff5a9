"""Lives of jails at random, with SIGKILL at any point to any of those who take part: nothing leaks, and what
should live does. `make test` has a few lives, always the same; `make test-fuzz` many, always others."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.support.jailer import needs_root, running_jailer
from tests.support.lives import SIZES, VICTIMS, WAYS, Life, Lives

_FEW, _MANY, _STEPS = 5, 60, 15
_MOST = 5  # jails at a time
picks = st.integers(0, 99)
delays = st.sampled_from((0.0, 0.001, 0.003, 0.006, 0.01, 0.02, 0.05))

Act = Coroutine[Any, Any, None]


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self._runner = asyncio.Runner()
        self._stack = AsyncExitStack()
        self._lives = Lives(self._do(self._stack.enter_async_context(running_jailer())))
        self._lives.begin()

    def teardown(self) -> None:
        try:
            self._do(self._lives.end())
        finally:
            try:
                self._do(self._stack.aclose())
            finally:
                self._runner.close()

    def _do(self, act: Coroutine[Any, Any, Any]) -> Any:
        return self._runner.run(act)

    def _some(self, pick: int, which: Callable[[Life], bool] = lambda life: True) -> str:
        """One of those that live and are so; empty if there is none."""
        found = sorted(id for id, life in self._lives.living.items() if which(life))
        return found[pick % len(found)] if found else ""

    @initialize()
    def settle(self) -> None:
        """So that there is always somebody to strike."""
        for way in WAYS:
            self.make_and_start(way)

    @invariant()
    def holds(self) -> None:
        self._do(self._lives.check())

    @precondition(lambda self: len(self._lives.living) < _MOST)
    @rule(way=st.sampled_from(WAYS))
    def make_and_start(self, way: str) -> None:
        if way == "fork" and self._lives.zygote is None:
            self.make_zygote()
        jail_id = self._lives.new_id(way)
        self._do(self._lives.make(way, jail_id))
        self._do(self._lives.start(jail_id))

    @precondition(lambda self: len(self._lives.living) < _MOST)
    @rule(way=st.sampled_from(WAYS), pick=picks)
    def make(self, way: str, pick: int) -> None:
        """Of an instance that has slept, if there is one."""
        if way == "fork" and self._lives.zygote is None:
            return
        asleep = sorted(set(self._lives.said) - set(self._lives.living)) if way != "task" else []
        jail_id = asleep[pick % len(asleep)] if asleep else self._lives.new_id(way)
        self._do(self._lives.make(way, jail_id))

    @precondition(lambda self: any(not life.started for life in self._lives.living.values()))
    @rule(pick=picks)
    def start(self, pick: int) -> None:
        if jail_id := self._some(pick, lambda life: not life.started and not life.frozen):
            self._do(self._lives.start(jail_id))

    @precondition(lambda self: self._lives.living)
    @rule(pick=picks)
    def freeze_or_thaw(self, pick: int) -> None:
        if jail_id := self._some(pick, lambda life: life.started):
            frozen = self._lives.living[jail_id].frozen
            self._do(self._lives.thaw(jail_id) if frozen else self._lives.freeze(jail_id))

    @precondition(lambda self: self._lives.living)
    @rule(pick=picks, limits=st.sampled_from(SIZES))
    def resize(self, pick: int, limits: Any) -> None:
        if jail_id := self._some(pick):
            self._do(self._lives.resize(jail_id, limits))

    @precondition(lambda self: self._lives.living)
    @rule(pick=picks)
    def kill(self, pick: int) -> None:
        if jail_id := self._some(pick):
            self._do(self._lives.kill(jail_id))

    @precondition(lambda self: set(self._lives.said) - set(self._lives.living))
    @rule(pick=picks)
    def discard(self, pick: int) -> None:
        asleep = sorted(set(self._lives.said) - set(self._lives.living))
        self._do(self._lives.discard(asleep[pick % len(asleep)]))

    @precondition(lambda self: self._lives.zygote is None)
    @rule()
    def make_zygote(self) -> None:
        self._do(self._lives.make_zygote(self._lives.new_id("zygote")))

    @precondition(lambda self: self._lives.zygote is not None)
    @rule()
    def kill_zygote(self) -> None:
        self._do(self._lives.kill_zygote())

    @rule(victim=st.sampled_from(VICTIMS), pick=picks)
    def strike(self, victim: str, pick: int) -> None:
        self._do(self._lives.strike(victim, self._some(pick, lambda life: life.started)))

    @precondition(lambda self: len(self._lives.living) < _MOST)
    @rule(victim=st.sampled_from(VICTIMS), way=st.sampled_from((*WAYS, "zygote")), delay=delays)
    def strike_while_it_is_made(self, victim: str, way: str, delay: float) -> None:
        if way == ("fork" if self._lives.zygote is None else "zygote"):
            return
        jail_id = self._lives.new_id(way)
        act = self._lives.make_zygote(jail_id) if way == "zygote" else self._lives.make(way, jail_id)
        self._do(self._lives.amid(act, jail_id, delay, victim, jail_id))

    @precondition(lambda self: self._lives.living)
    @rule(
        victim=st.sampled_from(VICTIMS),
        what=st.sampled_from(("start", "talk", "freeze", "kill", "resize")),
        pick=picks,
        delay=delays,
    )
    def strike_while_it_lives(self, victim: str, what: str, pick: int, delay: float) -> None:
        lives = self._lives
        match what:
            case "start":
                jail_id = self._some(pick, lambda life: not life.started and not life.frozen)
            case "talk":
                jail_id = self._some(pick, lambda life: life.can_talk)
            case _:
                jail_id = self._some(pick, lambda life: life.started)
        if not jail_id:
            return
        acts: dict[str, Callable[[], Act]] = {
            "start": lambda: lives.start(jail_id),
            "talk": lambda: lives.talk(jail_id),
            "freeze": lambda: lives.freeze(jail_id),
            "kill": lambda: lives.kill(jail_id),
            "resize": lambda: lives.resize(jail_id, SIZES[1]),
        }
        self._do(lives.amid(acts[what](), jail_id, delay, victim, jail_id))


def _run(lives: int, always_the_same: bool) -> None:
    """`deadline` is each act's own, in `Lives`."""
    how = settings(
        max_examples=lives,
        stateful_step_count=_STEPS,
        deadline=None,
        derandomize=always_the_same,
        database=None,
        phases=(Phase.generate,) if always_the_same else (Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        print_blob=not always_the_same,
    )
    run_state_machine_as_test(Machine, settings=how)


@needs_root
@pytest.mark.timeout(300)
def test_a_few_lives() -> None:
    _run(_FEW, True)


@needs_root
@pytest.mark.fuzz
@pytest.mark.timeout(3600)
def test_many_lives() -> None:
    _run(_MANY, False)
