"""Work in a thread that uses a descriptor of its caller, and work on many things, some at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar, TypeVarTuple

S = TypeVar("S")
T = TypeVar("T")
Args = TypeVarTuple("Args")


async def in_thread(function: Callable[[*Args], T], *args: *Args) -> T:
    """As asyncio.to_thread, but a cancellation takes effect only when the thread is done.

    Otherwise the caller would close the descriptor under the thread, which would then read or write
    whatever file is given the same number next.
    """
    task = asyncio.ensure_future(asyncio.to_thread(function, *args))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            try:
                await asyncio.wait([task])
            except asyncio.CancelledError:
                continue  # asked again; it is still the thread's
        if not task.cancelled():
            task.exception()  # the cancellation is what the caller hears of
        raise


async def each_of(items: Iterable[S], at_once: int, work: Callable[[S], Awaitable[object]]) -> None:
    """Does `work` on each. None goes on when this returns or raises; it raises the first error."""
    left = iter(items)

    async def some() -> None:
        for item in left:
            await work(item)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(at_once):
                group.create_task(some(), name="one of several")
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from errors
