"""Waiting for something to become true, with a deadline."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from typing import Any


async def eventually(condition: Callable[[], Any], timeout: float = 5.0, what: str = "") -> Any:
    """Calls `condition` (sync or async) every 20 ms until it gives something true, and returns that.

    AssertionError after `timeout` seconds, with the last value.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout
    while True:
        value = condition()
        if inspect.isawaitable(value):
            value = await value
        if value:
            return value
        if loop.time() > deadline:
            raise AssertionError(
                f"{what or 'the condition'} did not come true in {timeout} s; last: {value!r}"
            )
        await asyncio.sleep(0.02)
