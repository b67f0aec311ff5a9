"""Every order in which tasks can come to their turn, one after another: stateless model checking.

Fakes wait at a gate before each operation. `explore` runs a scenario again and again: whenever all its tasks
wait, one operation is let through, or a task that may crash is cancelled there, until each sequence of such
choices was taken. `sample` takes some at random.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Coroutine
from contextvars import ContextVar
from typing import Any

_NAME: ContextVar[str] = ContextVar("name", default="")
_SETTLE = 30  # turns of the loop after which a task waits at a gate or has ended


class Gates:
    """`name` tasks with `run`; those in `mortal` may be cancelled wherever they wait."""

    def __init__(self, choose: Callable[[int], int]) -> None:
        self._choose = choose
        self._waiting: dict[tuple[str, str], asyncio.Future[None]] = {}  # by task and operation
        self.tasks: dict[str, asyncio.Task[Any]] = {}
        self._mortal: set[str] = set()
        self.trace: list[str] = []

    def run(self, name: str, work: Coroutine[Any, Any, Any], mortal: bool = False) -> None:
        token = _NAME.set(name)  # for the tasks that it begins, too
        self.tasks[name] = asyncio.create_task(work, name=name)
        _NAME.reset(token)
        if mortal:
            self._mortal.add(name)

    async def arrive(self, what: str) -> None:
        """Called before an operation: returns when it is let through. What no scenario's task does passes."""
        name = _NAME.get()
        if not name:
            return
        gate = self._waiting[name, what] = asyncio.get_running_loop().create_future()
        try:
            await gate
        finally:
            del self._waiting[name, what]
        self.trace.append(f"{name}: {what}")

    async def finish(self, check: Callable[[], Awaitable[None]]) -> None:
        """Lets them through one at a time until all have ended; `check` after each."""
        while True:
            for _ in range(_SETTLE):
                await asyncio.sleep(0)
            await check()
            waiting = sorted(self._waiting)
            if not waiting:
                break
            mortal = sorted({name for name, _ in waiting} & self._mortal)
            choice = self._choose(len(waiting) + len(mortal))
            if choice < len(waiting):
                self._waiting[waiting[choice]].set_result(None)
            else:
                name = mortal[choice - len(waiting)]
                self.trace.append(f"{name} dies")
                self.tasks[name].cancel()
        for task in self.tasks.values():
            if not task.cancelled():
                task.result()


async def explore(scenario: Callable[[Gates], Awaitable[None]], most: int = 100_000) -> int:
    """How many schedules there were. `scenario` builds its world anew, begins tasks, and calls `finish`."""
    path: list[int] = []
    count = 0
    while count < most:
        widths: list[int] = []

        def choose(width: int, path: list[int] = path, widths: list[int] = widths) -> int:
            widths.append(width)
            return path[len(widths) - 1] if len(widths) <= len(path) else 0

        await _one(scenario, choose)
        count += 1
        path = [*path, *[0] * (len(widths) - len(path))][: len(widths)]
        while path and path[-1] + 1 == widths[len(path) - 1]:
            path.pop()
        if not path:
            return count
        path = [*path[:-1], path[-1] + 1]
    raise AssertionError(f"more than {most} schedules: make the scenario smaller, or sample it")


async def sample(scenario: Callable[[Gates], Awaitable[None]], count: int, seed: int = 1) -> None:
    chance = random.Random(seed)
    for _ in range(count):
        await _one(scenario, chance.randrange)


async def _one(scenario: Callable[[Gates], Awaitable[None]], choose: Callable[[int], int]) -> None:
    gates = Gates(choose)
    try:
        await scenario(gates)
    except Exception as error:
        raise AssertionError(f"{error!r} after:\n" + "\n".join(gates.trace)) from error
    finally:
        for task in gates.tasks.values():
            task.cancel()
        await asyncio.gather(*gates.tasks.values(), return_exceptions=True)
