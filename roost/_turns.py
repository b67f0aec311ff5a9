"""What a client does next when a turn could not be brought to its end. Pure: no I/O, no clock.

Invariant: a turn keeps its id through all tries, so trying again never applies it twice. Every try is paid
for, by a node that is newly excluded, by the one fresh ticket a round, or by a pause; so there is no busy
loop, whatever the mesh answers. It ends at the deadline, or with an error that trying again can't help.

A round is over when the mesh has no other node to offer: then there is a pause, and all nodes may be asked
again, since the one that failed may have come back, or the coordinators may have given it up by then.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import assert_never

from shared.errors import Reason, Remedy, RoostError

_FIRST_PAUSE = 0.05
_LONGEST_PAUSE = 1.0

# The ticket was the trouble, not the node: a new ticket may well be for the same one.
_TICKET = frozenset(
    {
        Reason.TICKET_EXPIRED,
        Reason.TICKET_WRONG_NODE,
        Reason.EPOCH_STALE,
        Reason.TURN_NOT_COMMITTED,
    }
)


@dataclass(frozen=True, slots=True)
class Progress:
    """Where one turn stands: nodes that failed in this round, whether a ticket was renewed in it, and how
    many pauses there have been."""

    exclude: frozenset[str] = frozenset()
    renewed: bool = False
    pauses: int = 0


@dataclass(frozen=True, slots=True)
class Refused:
    """The coordinators named no node."""

    error: RoostError


@dataclass(frozen=True, slots=True)
class Failed:
    """The node that they named did not bring the turn to its end."""

    node: str
    error: RoostError


Failure = Refused | Failed


@dataclass(frozen=True, slots=True)
class SendAgain:
    """The same turn to the same node, after a pause."""

    pause: float


@dataclass(frozen=True, slots=True)
class ResolveAgain:
    """The same turn to whichever node the coordinators name now, after a pause."""

    pause: float


@dataclass(frozen=True, slots=True)
class GiveUp:
    error: RoostError


Step = SendAgain | ResolveAgain | GiveUp


def decide(progress: Progress, failure: Failure, left: float) -> tuple[Progress, Step]:
    """What to do after `failure`, with `left` seconds until the turn's deadline."""
    error = failure.error
    if error.remedy is Remedy.GIVE_UP or left <= 0:
        return progress, GiveUp(error)
    match failure:
        case Failed(node) if error.remedy is Remedy.RESOLVE:
            if error.reason in _TICKET and not progress.renewed:
                return replace(progress, renewed=True), ResolveAgain(0.0)
            if error.reason not in _TICKET and node not in progress.exclude:
                return replace(progress, exclude=progress.exclude | {node}), ResolveAgain(0.0)
        case Failed() | Refused():
            pass
        case _:
            assert_never(failure)
    pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2.0**progress.pauses)
    if pause >= left:
        return progress, GiveUp(error)
    stay = isinstance(failure, Failed) and error.remedy is Remedy.RETRY
    return Progress(pauses=progress.pauses + 1), SendAgain(pause) if stay else ResolveAgain(pause)
