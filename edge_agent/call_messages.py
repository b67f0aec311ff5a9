"""What an agent says of its calls, and what it hears: "call", "called", "done" and "kept" of
docs/agent-protocol.md. What is parsed may be kept in a journal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from shared.effects import MAX_RESULT, Call, CallState, Repeat, checked
from shared.errors import Reason, RoostError

MAX_NUMBER = 1024  # beyond it is no call too many, but garbage


def parse_call(message: Mapping[str, Any]) -> Call:
    """BAD_REQUEST says what is wrong with it."""
    match message:
        case {"call": int(number), "name": str(name), "arguments": str(arguments), "repeat": str(repeat)}:
            try:
                call = Call(_number(number), name, arguments, Repeat(repeat), CallState.BEGUN)
                checked(Call(0, name, arguments, call.repeat, call.state))
            except ValueError as error:
                raise _bad(str(error)) from error
            return call
        case _:
            raise _bad("it needs 'call', 'name', 'arguments' and 'repeat'")


def parse_done(message: Mapping[str, Any]) -> tuple[int, CallState, str]:
    """Which call ended, and how. A result that is too large is a failure: it could not be kept."""
    match message:
        case {"call": int(number), "result": result}:
            text = json.dumps(result, ensure_ascii=False, separators=(",", ":"))
            if len(text.encode()) <= MAX_RESULT:
                return number, CallState.DONE, text
            told = f"its result has {len(text.encode())} bytes; at most {MAX_RESULT} can be kept"
            return number, CallState.FAILED, told
        case {"call": int(number), "failed": str(text)}:
            return number, CallState.FAILED, text[:2000]
        case _:
            raise _bad("its end needs 'call', and 'result' or 'failed'")


def called(turn_id: str, number: int, known: Call | None, key: str = "") -> bytes:
    """It may begin, with this key; or it was made before."""
    if known is None:
        return _encode("called", turn_id, number, key=key)
    return _encode("called", turn_id, number, **_outcome(known))


def kept(turn_id: str, call: Call) -> bytes:
    return _encode("kept", turn_id, call.number, **_outcome(call))


def refused(turn_id: str, number: int, error: RoostError) -> bytes:
    """It must not begin."""
    told = {"reason": error.reason.value, "message": error.message[:2000], "hint": error.hint[:2000]}
    return _encode("called", turn_id, number, error=told)


def _outcome(call: Call) -> dict[str, Any]:
    return {"result": json.loads(call.result)} if call.state is CallState.DONE else {"failed": call.result}


def _encode(kind: str, turn_id: str, number: int, **fields: Any) -> bytes:
    return json.dumps({"kind": kind, "id": turn_id, "call": number, **fields}).encode()


def _number(number: int) -> int:
    if isinstance(number, bool) or not 0 <= number < MAX_NUMBER:
        raise ValueError(f"{number} is no call's number")
    return number


def _bad(what: str) -> RoostError:
    return RoostError(
        Reason.BAD_REQUEST, f"a call can't be followed: {what}", "docs/effects.md says what may be"
    )
