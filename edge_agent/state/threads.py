"""Work in a thread that uses a descriptor of its caller."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar, TypeVarTuple

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
