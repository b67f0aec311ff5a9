"""One turn's exchange with the agent inside its jail: JSON messages, described in docs/agent-protocol.md.

Always true: it ends with the whole reply, or with an error that names what the agent did; nothing that the
agent sends can make the node wait longer than the turn's timeout or keep more than the size limit.
"""

from __future__ import annotations

import asyncio
import errno
import io
import json
import os
import signal
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from edge_agent.effects import TurnCalls
from edge_agent.jail.api import Exit, Jail, JailGone
from edge_agent.tasks import TurnTasks
from shared.errors import Reason, RoostError
from shared.rpc import MAX_TURN_BYTES

_NO_SPACE = (errno.EDQUOT, errno.ENOSPC, errno.EFBIG)
DISK_HINT = "raise resources.disk in agent.toml, or let the agent delete what need not outlive the turn"
MAX_RECEIVED = 16 * MAX_TURN_BYTES  # of all messages in a turn: a reply in small pieces, with their wrapping


@dataclass(frozen=True, slots=True)
class Turn:
    id: str
    user: str
    message: str
    timer: str = ""  # the name of the timer that starts it; empty: a message of the user does


@dataclass(frozen=True, slots=True)
class Note:
    """No part of the reply: what the turn waits for, for a person to read."""

    text: str


class Deltas:
    """Provisional text on its way to all who wait for a turn, each at their own pace. It is kept once, to the
    end of the turn, bounded by the reply's size limit. Of notes only the last is kept, and none once there is
    text."""

    def __init__(self) -> None:
        self._text = io.StringIO()
        self._note: Note | None = None
        self._held = self._closed = False
        self._changed = asyncio.Event()

    def hold(self) -> None:
        """From here on text is not passed on: nobody may see it before it is true."""
        self._held = True

    def add(self, text: str) -> None:
        if not self._held:
            self._text.write(text)
            self._note = None
            self._change()

    def note(self, text: str) -> None:
        self._note = Note(text)
        self._change()

    def close(self) -> None:
        self._closed = True
        self._change()

    def _change(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def listen(self) -> AsyncGenerator[str | Note, None]:
        """From the beginning to the end: the newest note, or all text that has come since what was last
        heard."""
        heard = 0
        seen: Note | None = None
        while True:
            changed = self._changed
            if self._note is not None and self._note is not seen:
                seen = self._note
                yield seen
            elif self._text.tell() > heard:
                self._text.seek(heard)
                text = self._text.read()  # which leaves it at the end
                heard += len(text)
                yield text
            elif self._closed:
                return
            else:
                await changed.wait()


async def wait_ready(jail: Jail, timeout: float) -> None:
    """Waits until the agent says that it is ready. AGENT_START_FAILED says why it is not."""
    try:
        async with asyncio.timeout(timeout):
            message = _parse(await jail.receive())
    except TimeoutError as error:
        raise RoostError(
            Reason.AGENT_START_FAILED,
            f"the agent was not ready within {timeout:g} s",
            "import less at the start, or raise run.start_timeout in agent.toml",
        ) from error
    except JailGone as gone:
        raise start_failed(gone.exit) from gone
    if message.get("kind") != "ready":
        raise _garbage(f"it began with {_cut(message.get('kind'))} instead of 'ready'")


async def run_turn(
    jail: Jail, turn: Turn, deltas: Deltas, tasks: TurnTasks, calls: TurnCalls, timeout: float
) -> str:
    """The agent's reply. TURN_FAILED, TURN_TIMEOUT, AGENT_CRASHED or AGENT_OUT_OF_MEMORY otherwise. Its tasks
    have ended then.

    JailGone: the agent had ended before it got this turn.
    """
    request = {"kind": "turn", "id": turn.id, "user": turn.user, "message": turn.message}
    if turn.timer:
        request["timer"] = turn.timer
    try:
        async with asyncio.timeout(timeout):
            await jail.send(json.dumps(request).encode())
            try:
                async with tasks:
                    return await _reply(jail, turn.id, deltas, tasks, calls)
            except JailGone as gone:
                raise crash(gone.exit) from gone
    except TimeoutError as error:
        raise timed_out(timeout) from error


async def _reply(jail: Jail, turn_id: str, deltas: Deltas, tasks: TurnTasks, calls: TurnCalls) -> str:
    streamed = received = 0
    while True:
        data = await jail.receive()
        message = _parse(data)
        if message.get("kind") != "run":  # of which few are kept at a time
            received += len(data)
        if received > MAX_RECEIVED:
            raise _garbage(f"it sent more than {MAX_RECEIVED >> 20} MiB in one turn")
        if message.get("id") != turn_id:
            raise _garbage(f"it answered turn {_cut(message.get('id'))} during turn {turn_id!r}")
        match message:
            case {"kind": "delta", "text": str(text)}:
                streamed += len(text.encode())
                check_size(streamed)
                deltas.add(text)
            case {"kind": "run"}:
                _within_protocol(tasks.begin, message)
            case {"kind": "call" | "done" | "timer"}:
                _within_protocol(calls.take, message)
            case {"kind": "reply", "text": str(text)}:
                check_size(len(text.encode()))
                return text
            case {"kind": "error", "message": str(text)}:
                said = f"the agent failed in this turn: {text[:2000]}"
                raise RoostError(Reason.TURN_FAILED, said, await _hint(jail, text))
            case _:
                raise _garbage(f"it sent a {_cut(message.get('kind'))} that has not the right fields")
        # An agent that never pauses must not keep the node from all else that it does.
        await asyncio.sleep(0)


async def _hint(jail: Jail, said: str) -> str:
    """What to do about a turn that failed with what the agent `said`."""
    if any(os.strerror(number) in said for number in _NO_SPACE):
        return f"{DISK_HINT}; what is under /tmp counts as memory, and may be half of resources.memory"
    with suppress(RoostError, JailGone):
        if count := (await jail.usage()).oom_kills:
            return (
                f"since it started, the kernel killed {count} of its processes for using too much memory: "
                "raise resources.memory in agent.toml, or use less"
            )
    return "its state is as it was before; the traceback is in the node's log"


def _within_protocol(take: Callable[[dict[str, Any]], None], message: dict[str, Any]) -> None:
    try:
        take(message)
    except RoostError as error:
        raise _garbage(error.message) from error


def _parse(data: bytes) -> dict[str, Any]:
    try:
        message = json.loads(data)
        if not isinstance(message, dict):
            raise _garbage("it sent JSON that is not an object")
        for value in message.values():
            if isinstance(value, str):
                value.encode()  # an escaped lone surrogate is JSON, but no text that can be passed on
    except (ValueError, RecursionError) as error:
        raise _garbage("it sent something that is not JSON in UTF-8") from error
    return message


def timed_out(timeout: float) -> RoostError:
    return RoostError(
        Reason.TURN_TIMEOUT,
        f"the agent did not answer within {timeout:g} s; its state is as it was before this turn",
        "raise run.turn_timeout in agent.toml if it needs longer",
    )


def _cut(value: object) -> str:
    return repr(value)[:80]


def check_size(size: int) -> None:
    if size > MAX_TURN_BYTES:
        raise RoostError(
            Reason.TURN_FAILED,
            f"the agent's reply is over the limit of {MAX_TURN_BYTES >> 20} MiB",
            "put large results into files under /state and reply with a summary",
        )


def _garbage(what: str) -> RoostError:
    return RoostError(
        Reason.AGENT_CRASHED,
        f"the agent broke the protocol: {what}",
        "use the roost package, and do not write to the descriptor in ROOST_FD yourself",
    )


def crash(exit: Exit) -> RoostError:
    """What an agent's unexpected end means to its user."""
    if exit.disk_full or exit.code == -signal.SIGXFSZ:
        return RoostError(
            Reason.STATE_TOO_LARGE,
            "the agent was ended, since it put more into /state than it may have; "
            "its state is as it was before this turn",
            DISK_HINT,
        )
    if exit.out_of_memory:
        return RoostError(
            Reason.AGENT_OUT_OF_MEMORY,
            "the agent ran out of memory; its state is as it was before this turn",
            "raise resources.memory in agent.toml, or use less",
        )
    return RoostError(
        Reason.AGENT_CRASHED,
        f"the agent {_ended(exit)}; its state is as it was before this turn",
        _last_line(exit),
    )


def start_failed(exit: Exit) -> RoostError:
    if exit.out_of_memory:
        return RoostError(
            Reason.AGENT_START_FAILED,
            "the agent ran out of memory while it started",
            "raise resources.memory in agent.toml, or import less",
        )
    return RoostError(
        Reason.AGENT_START_FAILED, f"the agent {_ended(exit)} while it started", _last_line(exit)
    )


def _ended(exit: Exit) -> str:
    return f"was killed by signal {-exit.code}" if exit.code < 0 else f"exited with code {exit.code}"


def _last_line(exit: Exit) -> str:
    lines = [line for line in exit.stderr_tail.splitlines() if line.strip()]
    return f"its last words: {lines[-1].strip()[:500]}" if lines else "it said nothing on standard error"
