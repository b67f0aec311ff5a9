"""`Turn.call`: what an agent does outside of its state, such that a turn that is run again finds what it
already did. Like agent.py it is bound into jails: standard library alone, Python 3.9.

    agent -> node   {"kind": "call", "id", "call", "name", "arguments", "repeat"}   may it begin?
    node -> agent   {"kind": "called", "id", "call", ...}   yes, with "key"; or its "result" or what "failed"
                                                            if it was made before; or an "error": no
    agent -> node   {"kind": "done", "id", "call", ...}     its "result", or what "failed"
    node -> agent   {"kind": "kept", "id", "call", ...}     which is durable now. Not told of safe calls
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from typing import Any

REPEATS = ("safe", "keyed", "never")
MAX_NAME = 128  # characters, as the node has it
_MOST_TOLD = 1000  # characters of an exception

Message = dict[str, Any]


class CallError(Exception):
    """A call that failed, now or when the turn ran before, or that may not be made. `reason` is for programs:
    FAILED (it was made, and raised), EFFECT_UNCERTAIN, EFFECT_MISMATCH, EFFECT_LIMIT."""

    def __init__(self, reason: str, message: str, hint: str = "") -> None:
        super().__init__(f"{message} ({hint})" if hint else message)
        self.reason = reason


class Calls:
    """Those of one turn. They are numbered in the order in which they are asked for."""

    def __init__(
        self, turn_id: str, emit: Callable[[Message], None], ask: Callable[[Message], Message]
    ) -> None:
        self._turn_id = turn_id
        self._emit = emit
        self._ask = ask
        self._numbers = itertools.count()

    def make(
        self,
        name: str,
        function: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        repeat: str,
    ) -> Any:
        if inspect.iscoroutinefunction(function):
            raise TypeError(f"{name!r} is async: use `await turn.call_async(...)`")
        asked = self._asked(name, args, kwargs, repeat)
        answer = self._begin(asked)
        if not _may_begin(answer):
            return _outcome(asked, answer)
        try:
            result = function(*args, **_with_key(kwargs, repeat, answer))
        except Exception as error:
            return self._failed(asked, error)
        return self._done(asked, result)

    async def make_async(
        self,
        name: str,
        function: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        repeat: str,
        threads: Executor,
    ) -> Any:
        """The node's answers are waited for in `threads`."""
        loop = asyncio.get_running_loop()
        asked = self._asked(name, args, kwargs, repeat)  # before anything is awaited: it sets the number
        answer = await loop.run_in_executor(threads, self._begin, asked)
        if not _may_begin(answer):
            return _outcome(asked, answer)
        try:
            result = function(*args, **_with_key(kwargs, repeat, answer))
            if inspect.isawaitable(result):
                result = await result
        except Exception as error:
            return await loop.run_in_executor(threads, self._failed, asked, error)
        return await loop.run_in_executor(threads, self._done, asked, result)

    def _asked(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], repeat: str) -> Message:
        if repeat not in REPEATS:
            raise ValueError(f'repeat is "safe", "keyed" or "never", not {repeat!r}')
        if not isinstance(name, str) or not name.isprintable() or not 1 <= len(name) <= MAX_NAME:
            raise ValueError(f"a call's name is 1 to {MAX_NAME} printable characters, not {name!r}")
        if repeat == "keyed" and "key" in kwargs:
            raise TypeError("the function of a keyed call gets its `key` from turn.call: don't pass one")
        return {
            "kind": "call",
            "id": self._turn_id,
            "call": next(self._numbers),
            "name": name,
            "arguments": hash_of(args, kwargs),
            "repeat": repeat,
        }

    def _begin(self, asked: Message) -> Message:
        return self._ask(asked)

    def _done(self, asked: Message, result: Any) -> Any:
        try:
            text = json.dumps(result)
        except (TypeError, ValueError) as error:
            wanted = TypeError(f"{asked['name']!r} must return what JSON can hold: {error}")
            return self._failed(asked, wanted)
        return _outcome(asked, self._end(asked, result=json.loads(text)))

    def _failed(self, asked: Message, error: Exception) -> Any:
        text = " ".join(str(error).split())[:_MOST_TOLD]
        told = f"{type(error).__name__}: {text}" if text else type(error).__name__
        try:
            return _outcome(asked, self._end(asked, failed=told))
        except CallError as failed:
            raise failed from error

    def _end(self, asked: Message, **how: Any) -> Message:
        done = {"kind": "done", "id": self._turn_id, "call": asked["call"], **how}
        if asked["repeat"] == "safe":  # the node keeps it when it next writes anyway
            self._emit(done)
            return how
        return self._ask(done)


def hash_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """The same in each run of a turn: of what JSON can't hold only the type counts."""
    text = json.dumps([list(args), dict(kwargs)], sort_keys=True, default=_in_words, skipkeys=True)
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:32]


def _in_words(value: object) -> str:
    if isinstance(value, (bytes, bytearray)):
        return "bytes " + hashlib.sha256(value).hexdigest()
    return type(value).__name__


def _may_begin(answer: Message) -> bool:
    return "key" in answer


def _with_key(kwargs: Mapping[str, Any], repeat: str, answer: Message) -> dict[str, Any]:
    return {**kwargs, "key": answer["key"]} if repeat == "keyed" else dict(kwargs)


def _outcome(asked: Message, answer: Message) -> Any:
    if "error" in answer:
        error = answer["error"]
        raise CallError(error["reason"], error["message"], error["hint"])
    if "failed" in answer:
        raise CallError("FAILED", f"{asked['name']!r} failed: {answer['failed']}")
    return answer["result"]
