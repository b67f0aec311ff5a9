"""One turn's exchange with the agent inside its jail: JSON messages, described in docs/agent-protocol.md.

Always true: it ends with the whole reply, or with an error that names what the agent did; nothing that the
agent sends can make the node wait longer than the turn's timeout or keep more than the size limit.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

from edge_agent.jail.api import Exit, Jail, JailGone
from shared.errors import Reason, RoostError
from shared.rpc import MAX_TURN_BYTES

_MAX_RECEIVED = 16 * MAX_TURN_BYTES  # of all messages in a turn: a reply in small pieces, with their wrapping


@dataclass(frozen=True, slots=True)
class Turn:
    id: str
    user: str
    message: str


class Deltas:
    """Provisional text on its way to one client. What the client is too slow for waits in one buffer, which
    the reply's size limit bounds."""

    def __init__(self) -> None:
        self._text = ""
        self._closed = False
        self._changed = asyncio.Event()

    def add(self, text: str) -> None:
        self._text += text
        self._changed.set()

    def close(self) -> None:
        self._closed = True
        self._changed.set()

    async def next(self) -> str | None:
        """All text that has come since the last call; waits for some. None: there will be no more."""
        while not self._text and not self._closed:
            self._changed.clear()
            await self._changed.wait()
        text, self._text = self._text, ""
        return text or None


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
        raise _start_failed(gone.exit) from gone
    if message.get("kind") != "ready":
        raise _garbage(f"it began with {_cut(message.get('kind'))} instead of 'ready'")


async def run_turn(jail: Jail, turn: Turn, deltas: Deltas, timeout: float) -> str:
    """The agent's reply. TURN_FAILED, TURN_TIMEOUT, AGENT_CRASHED or AGENT_OUT_OF_MEMORY otherwise.

    JailGone: the agent had ended before it got this turn.
    """
    request = {"kind": "turn", "id": turn.id, "user": turn.user, "message": turn.message}
    try:
        async with asyncio.timeout(timeout):
            await jail.send(json.dumps(request).encode())
            try:
                return await _reply(jail, turn.id, deltas)
            except JailGone as gone:
                raise crash(gone.exit) from gone
    except TimeoutError as error:
        raise RoostError(
            Reason.TURN_TIMEOUT,
            f"the agent did not answer within {timeout:g} s; its state is as it was before this turn",
            "raise run.turn_timeout in agent.toml if it needs longer",
        ) from error


async def _reply(jail: Jail, turn_id: str, deltas: Deltas) -> str:
    streamed = received = 0
    while True:
        data = await jail.receive()
        received += len(data)
        if received > _MAX_RECEIVED:
            raise _garbage(f"it sent more than {_MAX_RECEIVED >> 20} MiB in one turn")
        # An agent that never pauses must not keep the node from all else that it does.
        await asyncio.sleep(0)
        message = _parse(data)
        if message.get("id") != turn_id:
            raise _garbage(f"it answered turn {_cut(message.get('id'))} during turn {turn_id!r}")
        match message:
            case {"kind": "delta", "text": str(text)}:
                streamed += len(text.encode())
                _check_size(streamed)
                deltas.add(text)
            case {"kind": "reply", "text": str(text)}:
                _check_size(len(text.encode()))
                return text
            case {"kind": "error", "message": str(text)}:
                raise RoostError(
                    Reason.TURN_FAILED,
                    f"the agent failed in this turn: {text[:2000]}",
                    "its state is as it was before; the traceback is in the node's log",
                )
            case _:
                raise _garbage(f"it sent a {_cut(message.get('kind'))} that has not the right fields")


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


def _cut(value: object) -> str:
    return repr(value)[:80]


def _check_size(size: int) -> None:
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


def _start_failed(exit: Exit) -> RoostError:
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
