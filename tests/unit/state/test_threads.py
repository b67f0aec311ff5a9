from __future__ import annotations

import asyncio
import threading

import pytest

from edge_agent.state.threads import in_thread


async def test_a_result_and_an_error_come_through() -> None:
    assert await in_thread(max, 1, 2) == 2
    with pytest.raises(ZeroDivisionError):
        await in_thread(divmod, 1, 0)


async def test_a_cancelled_caller_waits_until_its_thread_is_done() -> None:
    begun, go = threading.Event(), threading.Event()
    told: list[str] = []

    def work() -> None:
        begun.set()
        assert go.wait(10)
        told.append("thread")

    async def caller() -> None:
        try:
            await in_thread(work)
        finally:
            told.append("caller")  # where it would close the descriptor

    task = asyncio.create_task(caller())
    assert await asyncio.to_thread(begun.wait, 10)
    for _ in range(2):
        task.cancel()
        await asyncio.sleep(0)
    assert told == []
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert told == ["thread", "caller"]
