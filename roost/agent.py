"""The agent SDK. This one file, with Python 3.9 or later and nothing else, is all that an agent needs.

    from roost import Agent

    agent = Agent()

    @agent.turn
    def hello(turn):
        visits = turn.state["visits"] = turn.state.get("visits", 0) + 1
        return f"Hello {turn.user}, this is visit {visits}."

On a node, the agent's process inherits a connected stream socket, whose descriptor is in ROOST_FD. Each
message is a 4-byte big-endian length and that many bytes of UTF-8 JSON:

    agent -> node   {"kind": "ready"}                             once, when it may get turns
    node -> agent   {"kind": "turn", "id", "user", "message"}     the next only after the reply or error
    agent -> node   {"kind": "delta", "id", "text"}               any number: a provisional piece of the reply
    agent -> node   {"kind": "reply", "id", "text"}               the turn is done
    agent -> node   {"kind": "error", "id", "message"}            the turn failed; the agent lives on

The node closes the socket to end the agent, which then exits with 0.
"""

from __future__ import annotations

import asyncio
import getpass
import importlib
import inspect
import json
import os
import socket
import struct
import sys
import threading
import traceback
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

FD_VARIABLE = "ROOST_FD"
STATE_DIR = Path("/state")
STATE_FILE = "roost.json"
LOCAL_STATE_DIR = Path(".roost-state")
MAX_FRAME = 8 << 20  # bytes, as the node has it
MAX_REPLY = 1 << 20  # bytes of a reply as UTF-8, as the node has it
EXIT_IMPORT = 3  # the agent could not be imported

_LENGTH = struct.Struct(">I")
_WANTED = "return the reply as a str, or yield it in pieces of str"

Handler = TypeVar("Handler", bound=Callable[..., Any])
Message = dict[str, Any]


class Turn:
    """One message of a user. `state` is kept as JSON in `state_dir`/roost.json when the turn succeeds;
    anything else may be kept as files in `state_dir`."""

    __slots__ = ("_emit", "id", "message", "state", "state_dir", "user")

    def __init__(
        self,
        asked: Message,
        state: dict[str, Any],
        state_dir: Path,
        emit: Callable[[Message], None],
    ) -> None:
        self.id: str = asked["id"]
        self.user: str = asked["user"]
        self.message: str = asked["message"]
        self.state = state
        self.state_dir = state_dir
        self._emit = emit

    def say(self, text: str) -> None:
        """Streams a piece of the reply to the user now. It stays provisional until the turn is committed."""
        if not isinstance(text, str):
            raise TypeError(f"say() wants a str, not {type(text).__name__}")
        self._emit({"kind": "delta", "id": self.id, "text": text})


class Agent:
    """An agent has one handler, set with `@agent.turn`, that answers each turn of its one user."""

    def __init__(self) -> None:
        self._handler: Callable[[Turn], Any] | None = None

    def turn(self, handler: Handler) -> Handler:
        """Makes `handler(turn)` the one that answers. It may be a function or an async one that returns the
        reply, or a generator (sync or async) that yields it in pieces."""
        if self._handler is not None:
            raise RuntimeError("this agent has a turn handler already: an agent has exactly one")
        self._handler = handler
        return handler

    def run(self) -> NoReturn:
        """Answers turns until the node ends it; outside of a node, those typed at this terminal."""
        if self._handler is None:
            raise RuntimeError("this agent has no turn handler: write one under @agent.turn")
        fd = os.environ.get(FD_VARIABLE)
        if fd is None:
            _chat_here(self._handler, LOCAL_STATE_DIR)
        else:
            with socket.socket(fileno=int(fd)) as node:
                serve(self._handler, node, STATE_DIR)
        sys.exit(0)


def main(entry: str) -> NoReturn:
    """Runs the agent that `entry`, `module:object`, names. Exits with 3 if it can't be imported."""
    try:
        agent = load(entry)
    except (Exception, SystemExit):
        traceback.print_exc()
        sys.exit(EXIT_IMPORT)
    agent.run()


def load(entry: str) -> Agent:
    """The agent that `entry` names. Raises what its import raises."""
    module_name, _, name = entry.partition(":")
    agent = getattr(importlib.import_module(module_name), name)
    if not isinstance(agent, Agent):
        raise TypeError(f"{entry} is a {type(agent).__name__}, not a roost.Agent")
    if agent._handler is None:
        raise RuntimeError(f"{entry} has no turn handler: write one under @agent.turn")
    return agent


# --- answering turns -----------------------------------------------------------------------------


class _Answerer:
    """Answers one user's turns, one after another, with `handler`.

    Invariant: between turns, the state in memory is what `state_dir`/roost.json says. After a failed turn
    it is read again, since the node may have put the file back. What a live agent sees and what a resumed
    one sees never differ, since the state kept in memory is always what JSON made of it.
    """

    def __init__(
        self, handler: Callable[[Turn], Any], state_dir: Path, emit: Callable[[Message], None]
    ) -> None:
        self._handler = handler
        self._state_dir = state_dir
        self._emit = emit
        self._saved: str | None = None  # the state's JSON; None: to be read
        self._loop: asyncio.AbstractEventLoop | None = None

    def answer(self, asked: Message) -> None:
        """Sends exactly one reply or error. Raises only what the agent can't outlive."""
        try:
            reply = self._run(asked)
        except Exception as error:
            traceback.print_exc()
            self._saved = None
            self._emit({"kind": "error", "id": asked["id"], "message": _one_line(error)})
        else:
            self._emit({"kind": "reply", "id": asked["id"], "text": reply})

    def _run(self, asked: Message) -> str:
        if self._saved is None:
            self._saved = self._read_state()
        turn = Turn(asked, json.loads(self._saved), self._state_dir, self._emit)
        reply = self._call(turn)
        if len(reply.encode("utf-8", "replace")) > MAX_REPLY:  # before the state is saved
            raise ValueError(f"the reply is over the limit of {MAX_REPLY >> 20} MiB")
        self._save_state(turn.state)
        return reply

    def _call(self, turn: Turn) -> str:
        result: Any = self._handler(turn)
        if inspect.isgenerator(result):
            return "".join(_said(turn, piece) for piece in result)
        if inspect.isasyncgen(result):
            result = self._wait(_join(turn, result))
        elif inspect.isawaitable(result):
            result = self._wait(_awaited(result))
        if not isinstance(result, str):
            raise TypeError(f"the turn handler returned {type(result).__name__}: {_WANTED}")
        return result

    def _wait(self, coroutine: Any) -> Any:
        if self._loop is None:  # kept, so that what the handler opened stays usable in later turns
            self._loop = asyncio.new_event_loop()
            asyncio.set_event_loop(self._loop)
        return self._loop.run_until_complete(coroutine)

    def _read_state(self) -> str:
        path = self._state_dir / STATE_FILE
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return "{}"
        try:
            state = json.loads(text)
        except ValueError as error:  # never go on as if there had been nothing
            raise RuntimeError(f"{path} holds no valid JSON ({error}): the state can't be read") from error
        if not isinstance(state, dict):
            raise TypeError(f"{path} holds a {type(state).__name__}, not an object: the state can't be read")
        return json.dumps(state)

    def _save_state(self, state: dict[str, Any]) -> None:
        try:
            text = json.dumps(state)
        except (TypeError, ValueError) as error:
            raise TypeError(f"turn.state can't be saved as JSON: {error}") from error
        if text == self._saved:
            return
        path = self._state_dir / STATE_FILE
        temporary = path.with_suffix(".tmp")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
        self._saved = text


def _said(turn: Turn, piece: object) -> str:
    if not isinstance(piece, str):
        raise TypeError(f"the turn handler yielded {type(piece).__name__}: {_WANTED}")
    turn.say(piece)
    return piece


async def _join(turn: Turn, pieces: Any) -> str:
    return "".join([_said(turn, piece) async for piece in pieces])


async def _awaited(result: Any) -> Any:
    return await result


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())[:1000]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _json(value: object) -> bytes:
    """`value` as JSON in UTF-8; lone surrogates, which UTF-8 can't carry, become question marks."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")


# --- on a node -----------------------------------------------------------------------------------


def serve(handler: Callable[[Turn], Any], node: socket.socket, state_dir: Path) -> None:
    """Answers the turns that come over `node`; returns when the other side has closed it."""
    sending = threading.Lock()  # a handler's threads may say something, too

    def emit(message: Message) -> None:
        payload = _json(message)
        with sending:
            node.sendall(_LENGTH.pack(len(payload)) + payload)

    answerer = _Answerer(handler, state_dir, emit)
    try:
        emit({"kind": "ready"})
        while True:
            payload = _receive(node)
            if payload is None:
                return
            message = json.loads(payload)
            if message["kind"] == "turn":  # other kinds are a newer node's: not for this SDK
                answerer.answer(message)
    except (BrokenPipeError, ConnectionResetError):
        return  # the node is gone, or has ended this agent


def _receive(node: socket.socket) -> bytes | None:
    """The next message, or None when the other side has closed."""
    header = _read_exactly(node, _LENGTH.size)
    if header is None:
        return None
    (length,) = _LENGTH.unpack(header)
    if length > MAX_FRAME:
        raise ValueError(f"the node sent a message of {length} bytes; at most {MAX_FRAME} are allowed")
    return _read_exactly(node, length)


def _read_exactly(node: socket.socket, count: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < count:
        part = node.recv(count - len(parts))
        if not part:
            return None
        parts += part
    return bytes(parts)


# --- at a terminal, without a node ---------------------------------------------------------------


def _chat_here(handler: Callable[[Turn], Any], state_dir: Path) -> None:
    state_dir.mkdir(exist_ok=True)
    prompt = "> " if sys.stdin.isatty() else ""
    if prompt:
        print(f"No node here: talking at this terminal, with the state in {state_dir}/. Ctrl-D ends it.")
    streamed: list[str] = []

    def emit(message: Message) -> None:
        if message["kind"] == "delta":
            streamed.append(message["text"])
            print(message["text"], end="", flush=True)
            return
        text = message["text"] if message["kind"] == "reply" else message["message"]
        if streamed:
            print()
        if text != "".join(streamed):
            print(text, flush=True)
        streamed.clear()

    answerer = _Answerer(handler, state_dir, emit)
    user = _user_name()
    while True:
        try:
            message = input(prompt)
            if message:
                answerer.answer({"id": uuid.uuid4().hex, "user": user, "message": message})
        except (EOFError, KeyboardInterrupt):
            return


def _user_name() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a uid without a name
        return "you"


if __name__ == "__main__":
    # Not this module's own main(): as `__main__` it is not the one that agents import.
    from roost.agent import main as run_entry

    if len(sys.argv) != 2:
        sys.exit("usage: python -m roost.agent MODULE:OBJECT")
    run_entry(sys.argv[1])
