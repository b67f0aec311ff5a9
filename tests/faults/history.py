"""What a run of the fault tests writes down: what clients asked and were told, and what the store held.

A client's operation is one turn, sent until there is an answer or no more patience. Operations with the same
turn id are the same turn, sent again on purpose. The agent keeps a list of numbers, twice: in `turn.state`
and in SQLite. Every reply gives both lists whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

Outcome = Literal["ok", "fail", "info"]


@dataclass(frozen=True, slots=True)
class Told:
    """A receipt."""

    node: str
    epoch: int
    version: int
    resumed_from: str = "live"
    resumed_version: int = 0
    lost: tuple[str, ...] = ()
    replayed: bool = False


@dataclass(frozen=True, slots=True)
class Op:
    """`number`, above 0, is to be appended; None: the turn only reads. `fail`: the client was told that
    nothing had changed. `info`: it does not know. Times are seconds on one monotonic clock."""

    client: str
    user: str
    turn: str
    number: int | None
    invoked: float
    ended: float
    outcome: Outcome
    reply: str = ""
    receipt: Told | None = None
    error: str = ""

    def lists(self) -> tuple[list[int], list[int]]:
        """Of an `ok`: the numbers in the agent's state, and those in SQLite."""
        both = json.loads(self.reply)
        return both["state"], both["sqlite"]


@dataclass(frozen=True, slots=True)
class Held:
    """A record of an instance, as etcd held it from `revision` on."""

    revision: int
    user: str
    epoch: int
    node: str
    version: int
    root: str
    last_turn: str


@dataclass(slots=True)
class History:
    """`final`: the numbers of each user once all faults were over; a user that could not be read is missing.
    `held` may be empty: then only what clients were told is judged."""

    ops: list[Op] = field(default_factory=list)
    held: list[Held] = field(default_factory=list)
    final: dict[str, list[int]] = field(default_factory=dict)

    def users(self) -> list[str]:
        return sorted({op.user for op in self.ops})

    def save(self, file: Path) -> None:
        """One JSON object a line: operations, records, final states."""
        lines: Iterable[object] = (
            *({"op": asdict(op)} for op in self.ops),
            *({"held": asdict(held)} for held in self.held),
            {"final": self.final},
        )
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))

    @classmethod
    def load(cls, file: Path) -> History:
        history = cls()
        for line in file.read_text().splitlines():
            match json.loads(line):
                case {"op": op}:
                    receipt = op.pop("receipt")
                    told = Told(**{**receipt, "lost": tuple(receipt["lost"])}) if receipt else None
                    history.ops.append(Op(**op, receipt=told))
                case {"held": held}:
                    history.held.append(Held(**held))
                case {"final": final}:
                    history.final = final
        return history
