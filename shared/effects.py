"""What a turn does outside of its state: a call, as its journal has it. For node and coordinator alike."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from enum import StrEnum

from protos.v1 import effects_pb2
from shared.errors import Reason, RoostError

MAX_CALLS = 64  # of one turn
MAX_RESULT = 64 << 10  # bytes of one call's result, as JSON in UTF-8
MAX_RESULTS = 256 << 10  # of all results of a turn
MAX_NAME = 128  # characters
MAX_UNFINISHED = 8  # turns of one instance whose journals are kept though they were not committed
_MAX_ARGUMENTS = 64


class Repeat(StrEnum):
    """May it be made again, when nobody knows whether it was made?"""

    SAFE = "safe"
    KEYED = "keyed"  # yes, with the same key
    NEVER = "never"


class CallState(StrEnum):
    BEGUN = "begun"  # it may have been made
    DONE = "done"
    FAILED = "failed"  # it was made, and ended with an exception
    UNCERTAIN = "uncertain"  # begun, never to be repeated, and its end is not known: a person has to say
    NOT_MADE = "not_made"  # as a person said: it is to be made


@dataclass(frozen=True, slots=True)
class Call:
    """`arguments`: their hash. `result`: JSON if it is DONE, what the exception said if it FAILED.
    `revision`: of the store when this was written; 0: it is not there yet."""

    number: int
    name: str
    arguments: str
    repeat: Repeat
    state: CallState
    result: str = ""
    epoch: int = 0
    revision: int = 0

    def to_proto(self) -> effects_pb2.Call:
        return effects_pb2.Call(
            number=self.number,
            name=self.name,
            arguments=self.arguments,
            repeat=effects_pb2.Repeat.Value(self.repeat.name),
            state=effects_pb2.CallState.Value(self.state.name),
            result=self.result,
            epoch=self.epoch,
            revision=self.revision,
        )

    @classmethod
    def from_proto(cls, proto: effects_pb2.Call) -> Call:
        """BAD_REQUEST if no journal may hold it."""
        try:
            return checked(
                cls(
                    proto.number,
                    proto.name,
                    proto.arguments,
                    Repeat[effects_pb2.Repeat.Name(proto.repeat)],
                    CallState[effects_pb2.CallState.Name(proto.state)],
                    proto.result,
                    proto.epoch,
                    proto.revision,
                )
            )
        except (KeyError, ValueError) as error:
            raise RoostError(
                Reason.BAD_REQUEST,
                f"no journal may hold this call: {error}",
                "docs/effects.md says what may be",
            ) from error

    def same_as(self, other: Call) -> bool:
        """Equal, whenever it was written."""
        return replace(self, revision=0) == replace(other, revision=0)


def checked(call: Call) -> Call:
    """ValueError says what is wrong with it."""
    if not 0 <= call.number < MAX_CALLS:
        raise ValueError(f"a turn makes at most {MAX_CALLS} calls")
    if not 1 <= len(call.name) <= MAX_NAME or not call.name.isprintable():
        raise ValueError(f"a call's name is 1 to {MAX_NAME} printable characters")
    if len(call.arguments) > _MAX_ARGUMENTS or not call.arguments.isalnum():
        raise ValueError(f"the hash of a call's arguments is 1 to {_MAX_ARGUMENTS} letters and digits")
    if len(call.result.encode()) > MAX_RESULT:
        raise ValueError(f"a call's result is at most {MAX_RESULT >> 10} KiB")
    if call.state is CallState.DONE:
        json.loads(call.result)
    return call
