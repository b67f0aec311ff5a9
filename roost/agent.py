"""The agent SDK. This file and those of `_effects`, `_line`, `_tasks` and `_timers`, with Python 3.9 or later
and nothing else, are all that an agent needs.

    from roost import Agent

    agent = Agent()

    @agent.turn
    def hello(turn):
        visits = turn.state["visits"] = turn.state.get("visits", 0) + 1
        return f"Hello {turn.user}, this is visit {visits}."

On a node, the agent's process inherits a connected stream socket, whose descriptor is in ROOST_FD. Each
message is a 4-byte big-endian length and that many bytes of UTF-8 JSON:

    agent -> node   {"kind": "ready"}                             when it may get turns
    node -> agent   {"kind": "warm"}                              before any turn: it is to warm up, and to be
                                                                  "ready" again
    node -> agent   {"kind": "turn", "id", "user", "message"}     the next only after the reply or error
    agent -> node   {"kind": "delta", "id", "text"}               any number: a provisional piece of the reply
    agent -> node   {"kind": "run", "id", "task", "argv", ...}    any number: a command for a jail of its own
    node -> agent   {"kind": "result", "id", "task", ...}         one for each of those, while the turn lasts
    agent -> node   {"kind": "call"} and {"kind": "done"}         what it does outside: see _effects.py
    agent -> node   {"kind": "timer"}                             a turn for later: see _timers.py
    agent -> node   {"kind": "reply", "id", "text"}               the turn is done
    agent -> node   {"kind": "error", "id", "message"}            the turn failed; the agent lives on

The node closes the socket to end the agent, which then exits with 0.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import inspect
import json
import os
import socket
import struct
import sys
import traceback
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from roost import _tasks, _timers
from roost._effects import Calls
from roost._line import Line, Message
from roost._tasks import TaskResult

FD_VARIABLE = "ROOST_FD"
STATE_DIR = Path("/state")
STATE_FILE = "roost.json"
LOCAL_STATE_DIR = Path(".roost-state")
MAX_REPLY = 1 << 20  # bytes of a reply as UTF-8, as the node has it
EXIT_IMPORT = 3  # the agent could not be imported

_REHEARSALS, _REHEARSAL_DIR = 10, Path("/tmp/.roost-rehearsal")  # in a zygote
_WANTED = "return the reply as a str, or yield it in pieces of str"

Handler = TypeVar("Handler", bound=Callable[..., Any])


class Turn:
    """One message of a user. `state` is kept as JSON in `state_dir`/roost.json when the turn succeeds;
    anything else may be kept as files in `state_dir`."""

    __slots__ = ("_ask", "_calls", "_emit", "id", "message", "state", "state_dir", "timer", "user")

    def __init__(
        self,
        asked: Message,
        state: dict[str, Any],
        state_dir: Path,
        emit: Callable[[Message], None],
        ask: Callable[[Message], Message],
    ) -> None:
        self.id: str = asked["id"]
        self.user: str = asked["user"]
        self.message: str = asked["message"]
        self.timer: str | None = asked.get("timer")  # the name of what started it, if it was no message
        self.state = state
        self.state_dir = state_dir
        self._emit = emit
        self._ask = ask
        self._calls = Calls(self.id, emit, ask)

    def say(self, text: str) -> None:
        """Streams a piece of the reply to the user now. It stays provisional until the turn is committed."""
        if not isinstance(text, str):
            raise TypeError(f"say() wants a str, not {type(text).__name__}")
        self._emit({"kind": "delta", "id": self.id, "text": text})

    def run(
        self,
        argv: Sequence[str],
        *,
        files: Mapping[str, bytes | str] | None = None,
        memory: str | int | None = None,
        cpu: float | None = None,
        pids: int | None = None,
        timeout: float | None = None,
        outputs: Sequence[str] = (),
    ) -> TaskResult:
        """Runs a command in a jail of its own, and waits for its end. It starts in an empty directory with
        `files` in it (path to content), has no network, and nothing of it is left afterwards but the result;
        `outputs` are patterns, like "*.png", of the files to bring back. `memory` ("64M"), `cpu` (cores),
        `pids` and `timeout` (seconds) are at most what agent.toml allows, and that if they are not given.

        Threads may run several at once. TaskError if the node can't run it; how it ended is in the result."""
        asked = _tasks.request(self.id, argv, files or {}, outputs)
        wanted: Message = {"memory": memory, "cpu": cpu, "pids": pids, "timeout": timeout}
        asked.update({name: value for name, value in wanted.items() if value is not None})
        return _tasks.result(self._ask(asked))

    async def run_async(self, argv: Sequence[str], **options: Any) -> TaskResult:
        """As `run`, for async handlers. Cancelling it does not end the task: the end of the turn does."""
        call = functools.partial(self.run, argv, **options)
        return await asyncio.get_running_loop().run_in_executor(_tasks.threads(), call)

    def call(self, name: str, function: Callable[..., Any], /, *args: Any, repeat: str, **kwargs: Any) -> Any:
        """Does something outside of the state: returns `function(*args, **kwargs)`, as JSON has it. If this
        turn was run before and `function` ended then, its result is returned, and it is not called again.
        Else `repeat` decides: "safe" calls it again; "keyed" calls it with a `key=` that is the same in each
        run; "never" does not: the turn fails until a person has said whether it was done (`roost effects`).

        CallError if `function` raised, now or then, or must not be called. A turn must make the same calls,
        in the same order, each time it is run."""
        return self._calls.make(name, function, args, kwargs, repeat)

    async def call_async(
        self, name: str, function: Callable[..., Any], /, *args: Any, repeat: str, **kwargs: Any
    ) -> Any:
        """As `call`, for async handlers; `function` may be async, too."""
        return await self._calls.make_async(name, function, args, kwargs, repeat, _tasks.threads())

    def wake_at(self, when: datetime | float, message: str = "", *, name: str = "wake") -> None:
        """Has a turn started `when` it is time (a datetime with a zone, or seconds since 1970), whether or
        not anybody is attached then, and wherever the instance is: its `message` is this one, its `timer` is
        `name`. It takes the place of an older timer of that name. It counts if this turn is committed."""
        self._emit(_timers.at(self.id, name, when, message))

    def wake_in(self, seconds: float, message: str = "", *, name: str = "wake") -> None:
        """As `wake_at`, so many seconds (1 or more) after this turn is committed."""
        self._emit(_timers.after(self.id, name, seconds, message))

    def cancel_wake(self, name: str = "wake") -> None:
        """Takes back a timer, if there is one of that name; it counts if this turn is committed."""
        self._emit(_timers.cancel(self.id, name))


class Agent:
    """An agent has one handler, set with `@agent.turn`, that answers each turn of its one user."""

    def __init__(self) -> None:
        self._handler: Callable[[Turn], Any] | None = None
        self._warm_up: Callable[[], Any] | None = None
        self._service: tuple[Line, Answerer] | None = None

    def turn(self, handler: Handler) -> Handler:
        """Makes `handler(turn)` the one that answers. It may be a function or an async one that returns the
        reply, or a generator (sync or async) that yields it in pieces."""
        if self._handler is not None:
            raise RuntimeError("this agent has a turn handler already: an agent has exactly one")
        self._handler = handler
        return handler

    def warm_up(self, function: Handler) -> Handler:
        """Makes `function()`, which may be async, run in the processes that are next to be given to a user,
        before one comes: what is made at first use is then made. It has no state and no network, and is for
        speed alone: a process whose user is there already does without it, and so does one in which it
        fails."""
        self._warm_up = function
        return function

    def prepare(self, node: socket.socket) -> None:
        """Makes what `run` needs to talk to `node`, once for all forks: this process itself does not run."""
        assert self._handler is not None
        self._service = service(self._handler, node, STATE_DIR)
        for number in range(_REHEARSALS):
            self._service[1].rehearse(_REHEARSAL_DIR, str(number))

    def make_loop(self) -> None:
        """Of what is prepared: what an asynchronous handler's first turn would make."""
        if self._service is not None:
            self._service[1].make_loop()

    def run(self) -> NoReturn:
        """Answers turns until the node ends it; outside of a node, those typed at this terminal."""
        if self._handler is None:
            raise RuntimeError("this agent has no turn handler: write one under @agent.turn")
        if self._service is not None:
            serve(*self._service, self._warm_up)
        elif (fd := os.environ.get(FD_VARIABLE)) is not None:
            with socket.socket(fileno=int(fd)) as node:
                serve(*service(self._handler, node, STATE_DIR), self._warm_up)
        else:
            from roost import _here  # is not in jails

            _here.chat(self._handler, LOCAL_STATE_DIR)
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


class Answerer:
    """Answers one user's turns, one after another, with `handler`.

    Invariant: between turns, the state in memory is what `state_dir`/roost.json says. After a failed turn
    it is read again, since the node may have put the file back. What a live agent sees and what a resumed
    one sees never differ, since the state kept in memory is always what JSON made of it.
    """

    def __init__(
        self,
        handler: Callable[[Turn], Any],
        state_dir: Path,
        emit: Callable[[Message], None],
        ask: Callable[[Message], Message],
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self._handler = handler
        self._state_dir = state_dir
        self._emit = emit
        self._ask = ask
        self._saved: str | None = None  # the state's JSON; None: to be read
        self._loop = loop

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

    def get_warm(self, warm_up: Callable[[], Any] | None) -> None:
        """Makes what a first turn would, while there is no user yet, and runs what the developer has for it.
        That this fails is no reason not to answer turns."""
        try:
            self.make_loop()
            rehearse(self._state_dir, self._loop)
            result = None if warm_up is None else warm_up()
            if inspect.isawaitable(result):
                self._wait(_awaited(result))
        except Exception:
            traceback.print_exc()

    def make_loop(self) -> None:
        """For an asynchronous handler, if there is none yet."""
        if self._loop is None and _is_async(self._handler):
            self._loop = _new_loop()
            self._loop.run_until_complete(asyncio.sleep(0))

    def rehearse(self, state_dir: Path, message: str) -> None:
        """In a zygote, which keeps nothing of it but what the interpreter has learnt: after some calls of a
        function it writes to its code no more."""
        # Not of the agent's own policy: what that would keep of it is not made for a fork.
        loop = asyncio.SelectorEventLoop() if _is_async(self._handler) else None
        state_dir.mkdir(mode=0o700, exist_ok=True)
        rehearse(state_dir, loop, message)
        (state_dir / STATE_FILE).unlink()
        state_dir.rmdir()
        if loop is not None:
            loop.close()

    def _run(self, asked: Message) -> str:
        if self._saved is None:
            self._saved = self._read_state()
        turn = Turn(asked, json.loads(self._saved), self._state_dir, self._emit, self._ask)
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
            self._loop = _new_loop()
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


def _is_async(handler: Callable[[Turn], Any]) -> bool:
    return inspect.iscoroutinefunction(handler) or inspect.isasyncgenfunction(handler)


def _said(turn: Turn, piece: object) -> str:
    if not isinstance(piece, str):
        raise TypeError(f"the turn handler yielded {type(piece).__name__}: {_WANTED}")
    turn.say(piece)
    return piece


async def _join(turn: Turn, pieces: Any) -> str:
    return "".join([_said(turn, piece) async for piece in pieces])


async def _awaited(result: Any) -> Any:
    return await result


def _new_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    return loop


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())[:1000]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


# --- on a node -----------------------------------------------------------------------------------


def service(
    handler: Callable[[Turn], Any],
    node: socket.socket,
    state_dir: Path,
    loop: asyncio.AbstractEventLoop | None = None,
) -> tuple[Line, Answerer]:
    """What `serve` serves with. `loop` is for asynchronous handlers, if there is one already."""
    line = Line(node)
    return line, Answerer(handler, state_dir, line.emit, line.ask, loop)


def serve(line: Line, answerer: Answerer, warm_up: Callable[[], Any] | None = None) -> None:
    """Answers the turns that come over `line`; returns when the node has closed it. `warm_up` is run when the
    node says so."""
    try:
        line.ready()
        while (asked := line.next()) is not None:
            if asked["kind"] == "turn":
                answerer.answer(asked)
            else:
                answerer.get_warm(warm_up)
                line.ready()
    except (BrokenPipeError, ConnectionResetError):
        return  # the node is gone, or has ended this agent


def rehearse(state_dir: Path, loop: asyncio.AbstractEventLoop | None, message: str = "") -> None:
    """Answers a turn to nobody, while there is no user yet. A forked process has to copy each page that it is
    the first to write to, and in CPython to run code is to write: the first turn of a user then finds most of
    it done. The agent's own code has no part in it. With a `message`, that is saved as its state."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        asked = json.dumps({"kind": "turn", "id": "", "user": "", "message": message}).encode()
        theirs.sendall(struct.pack(">I", len(asked)) + asked)
        theirs.shutdown(socket.SHUT_WR)
        serve(*service(_rehearsed if loop is None else _rehearsed_async, ours, state_dir, loop))


def _rehearsed(turn: Turn) -> Iterator[str]:
    if turn.message:
        turn.state["message"] = turn.message
    yield ""


async def _rehearsed_async(turn: Turn) -> AsyncIterator[str]:
    for piece in _rehearsed(turn):
        yield piece


if __name__ == "__main__":
    # Not this module's own main(): as `__main__` it is not the one that agents import.
    from roost.agent import main as run_entry

    if len(sys.argv) != 2:
        sys.exit("usage: python -m roost.agent MODULE:OBJECT")
    run_entry(sys.argv[1])
