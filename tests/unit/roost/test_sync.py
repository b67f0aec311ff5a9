"""`roost.Client` ends what is left in its loop, and takes over nobody's."""

from __future__ import annotations

import asyncio
import gc
import warnings

import pytest

from roost._sync import _LoopThread


def test_what_is_left_in_the_loop_is_ended_and_not_forgotten(caplog: pytest.LogCaptureFixture) -> None:
    ended: list[str] = []

    async def left() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("ended")

    tasks: list[asyncio.Task[None]] = []

    async def leave() -> None:
        tasks.append(asyncio.create_task(left()))
        await asyncio.sleep(0)

    loop = _LoopThread()
    loop.run(leave())
    loop.stop()
    tasks.clear()
    gc.collect()
    assert loop.stopped
    assert ended == ["ended"]
    assert "Task was destroyed" not in caplog.text


def test_the_caller_s_own_loop_stays_the_caller_s() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        own = asyncio.new_event_loop()
        asyncio.set_event_loop(own)
        try:
            loop = _LoopThread()
            loop.stop()
            assert asyncio.get_event_loop_policy().get_event_loop() is own
        finally:
            asyncio.set_event_loop(None)
            own.close()


async def test_it_can_be_stopped_where_another_loop_runs() -> None:
    loop = _LoopThread()
    loop.stop()
    assert loop.stopped
