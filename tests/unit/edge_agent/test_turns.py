"""The exchange with an agent that may say anything, or nothing."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from contextlib import suppress
from typing import Any

import pytest

from edge_agent.jail.api import Exit, JailGone, Usage
from edge_agent.jail.turns import TurnSocket
from edge_agent.turns import Deltas, Note, Turn, run_turn, wait_ready
from shared.errors import Reason, RoostError
from tests.support.calls import no_calls
from tests.support.tasks import no_tasks

TURN = Turn("t1", "ana", "hi")


class ScriptedJail:
    """Says what it was given to say, then ends as told, or stays silent."""

    def __init__(self, *says: dict[str, Any] | bytes, ends: Exit | None = None) -> None:
        self.heard: list[dict[str, Any]] = []
        self.oom_kills = 0
        self._says = [s if isinstance(s, bytes) else json.dumps(s).encode() for s in says]
        self._ends = ends

    async def usage(self) -> Usage:
        return Usage(1 << 20, 0.0, 1, self.oom_kills)

    async def send(self, message: bytes) -> None:
        self.heard.append(json.loads(message))

    async def receive(self) -> bytes:
        if self._says:
            return self._says.pop(0)
        if self._ends:
            raise JailGone(self._ends)
        await asyncio.Event().wait()
        raise AssertionError


async def reply_of(jail: ScriptedJail, deltas: Deltas | None = None, timeout: float = 5.0) -> str:
    return await run_turn(jail, TURN, deltas or Deltas(), no_tasks(), no_calls(), timeout)  # type: ignore[arg-type]


async def test_whoever_listens_hears_all_of_it_at_their_own_pace() -> None:
    deltas = Deltas()
    deltas.note("packages")
    early, slow = deltas.listen(), deltas.listen()
    assert await anext(early) == Note("packages")
    deltas.add("a")
    assert await anext(early) == "a"
    coming = asyncio.ensure_future(anext(early))
    await asyncio.sleep(0)
    deltas.add("b")
    assert await coming == "b"
    assert await anext(slow) == "ab", "what it waited for is over"
    deltas.hold()
    deltas.add("c")
    deltas.close()
    assert [await anext(said, None) for said in (early, slow)] == [None, None]
    assert [said async for said in deltas.listen()] == ["ab"]


async def test_deltas_then_the_reply() -> None:
    deltas = Deltas()
    jail = ScriptedJail(
        {"kind": "delta", "id": "t1", "text": "hel"},
        {"kind": "delta", "id": "t1", "text": "lo"},
        {"kind": "reply", "id": "t1", "text": "hello"},
    )
    assert await reply_of(jail, deltas) == "hello"
    assert jail.heard == [{"kind": "turn", "id": "t1", "user": "ana", "message": "hi"}]
    deltas.close()
    assert [text async for text in deltas.listen()] == ["hello"]


@pytest.mark.parametrize(
    ("says", "reason"),
    [
        ({"kind": "error", "id": "t1", "message": "ValueError: no"}, Reason.TURN_FAILED),
        ({"kind": "reply", "id": "t1", "text": "x" * (1 << 20) + "y"}, Reason.TURN_FAILED),
        ({"kind": "delta", "id": "t1", "text": "x" * (1 << 20) + "y"}, Reason.TURN_FAILED),
        ({"kind": "reply", "id": "t0", "text": "late"}, Reason.AGENT_CRASHED),
        ({"kind": "reply", "id": "t1", "text": 5}, Reason.AGENT_CRASHED),
        ({"kind": "what", "id": "t1"}, Reason.AGENT_CRASHED),
        ({"kind": "run", "id": "t1", "argv": ["true"]}, Reason.AGENT_CRASHED),
        (b"\xff\xfe", Reason.AGENT_CRASHED),
        (b"[1]", Reason.AGENT_CRASHED),
        (b"[" * 200_000, Reason.AGENT_CRASHED),
        (b'{"kind": "reply", "id": "t1", "text": "\\ud800"}', Reason.AGENT_CRASHED),
        (b'{"kind": "error", "id": "t1", "message": "\\ud800"}', Reason.AGENT_CRASHED),
        ({"kind": "x" * (1 << 20), "id": "t1"}, Reason.AGENT_CRASHED),
    ],
)
async def test_whatever_it_says_the_error_has_a_name_and_a_hint(
    says: dict[str, Any] | bytes, reason: Reason
) -> None:
    with pytest.raises(RoostError) as caught:
        await reply_of(ScriptedJail(says))
    assert caught.value.reason is reason
    assert caught.value.hint


@pytest.mark.parametrize(
    ("said", "oom_kills", "advice"),
    [
        ("OSError: [Errno 122] Disk quota exceeded: '/state/a'", 0, "resources.disk"),
        ("OSError: [Errno 28] No space left on device: '/tmp/a'", 0, "resources.memory"),
        ("cp: error writing 'a': File too large", 0, "resources.disk"),
        ("CalledProcessError: died with <Signals.SIGKILL: 9>", 2, "killed 2 of its processes"),
        ("ValueError: no", 0, "the node's log"),
    ],
)
async def test_a_failed_turn_comes_with_advice(said: str, oom_kills: int, advice: str) -> None:
    jail = ScriptedJail({"kind": "error", "id": "t1", "message": said})
    jail.oom_kills = oom_kills
    with pytest.raises(RoostError) as caught:
        await reply_of(jail)
    assert caught.value.reason is Reason.TURN_FAILED
    assert advice in caught.value.hint


@pytest.mark.parametrize(
    ("exit", "reason", "words"),
    [
        (Exit(1, False, "Traceback\nKeyError: 'x'\n"), Reason.AGENT_CRASHED, "exited with code 1"),
        (Exit(-11, False), Reason.AGENT_CRASHED, "killed by signal 11"),
        (Exit(-9, True), Reason.AGENT_OUT_OF_MEMORY, "ran out of memory"),
        (Exit(-9, False, disk_full=True), Reason.STATE_TOO_LARGE, "more into /state than it may have"),
        (Exit(-25, False), Reason.STATE_TOO_LARGE, "more into /state than it may have"),
    ],
)
async def test_a_crash_says_how(exit: Exit, reason: Reason, words: str) -> None:
    with pytest.raises(RoostError, match=words) as caught:
        await reply_of(ScriptedJail(ends=exit))
    assert caught.value.reason is reason
    if exit.stderr_tail:
        assert "KeyError: 'x'" in caught.value.hint


async def test_an_agent_that_never_pauses_holds_up_nobody_else() -> None:
    """A real socket that always has another empty delta: only a bound and a pause end it."""
    ours, theirs = socket.socketpair()
    stop = threading.Event()

    def flood() -> None:
        body = json.dumps({"kind": "delta", "id": "t1", "text": ""}).encode()
        frames = (len(body).to_bytes(4, "big") + body) * 1000
        with suppress(OSError):
            while not stop.is_set():
                theirs.sendall(frames)

    flooder = threading.Thread(target=flood, daemon=True)
    turns = TurnSocket(ours)
    flooder.start()
    beats = 0

    async def heartbeats() -> None:
        nonlocal beats
        while True:
            await asyncio.sleep(0)
            beats += 1

    beating = asyncio.create_task(heartbeats())
    try:
        with pytest.raises(RoostError) as caught:
            await run_turn(turns, TURN, Deltas(), no_tasks(), no_calls(), 60.0)  # type: ignore[arg-type]
        assert caught.value.reason is Reason.AGENT_CRASHED
        assert "MiB in one turn" in caught.value.message
        assert beats > 1000
    finally:
        stop.set()
        beating.cancel()
        turns.close()
        theirs.close()
        flooder.join(5)


async def test_silence_ends_at_the_timeout() -> None:
    with pytest.raises(RoostError) as caught:
        await reply_of(ScriptedJail(), timeout=0.01)
    assert caught.value.reason is Reason.TURN_TIMEOUT


async def test_not_ready() -> None:
    for jail, words in (
        (
            ScriptedJail(ends=Exit(3, False, "ImportError: no module x")),
            "exited with code 3 while it started",
        ),
        (ScriptedJail(), "was not ready within"),
    ):
        with pytest.raises(RoostError, match=words) as caught:
            await wait_ready(jail, 0.01)  # type: ignore[arg-type]
        assert caught.value.reason is Reason.AGENT_START_FAILED
