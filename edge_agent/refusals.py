"""What an instance says to those whose turn, or move, it does not carry out."""

from __future__ import annotations

from shared.errors import Reason, RoostError
from shared.identity import InstanceKey

_AGAIN = "send it again under the same id: it is applied once"
_ELSEWHERE = "resolve again, and send the turn again under the same id"


def not_owner(node: str, key: InstanceKey, why: str) -> RoostError:
    return RoostError(Reason.EPOCH_STALE, f"node {node} does not own {key} any more: {why}", _ELSEWHERE)


def built_on(failure: RoostError) -> RoostError:
    """What runs builds on a turn that could not be committed."""
    return RoostError(
        Reason.TURN_NOT_COMMITTED,
        f"the turn before could not be committed, and this one built on it: {failure.message}",
        _AGAIN,
    )


def lost_touch(node: str, error: RoostError) -> RoostError:
    return RoostError(
        Reason.NODE_SUSPENDED,
        f"node {node} lost touch with its coordinator during the turn ({error.message})",
        _ELSEWHERE,
    )


def reply_gone(turn_id: str) -> RoostError:
    return RoostError(
        Reason.TURN_REPLY_GONE,
        f"turn {turn_id} was applied, but its reply is no longer kept",
        "send new messages under new turn ids",
    )


def too_many(key: InstanceKey, most: int) -> RoostError:
    return RoostError(Reason.DEADLINE, f"{most} turns of {key} wait already", "send it again in a while")


def turn_goes_on(key: InstanceKey, seconds: float) -> RoostError:
    return RoostError(
        Reason.MOVE_GIVEN_UP, f"a turn of {key} did not end within {seconds:g} s", "try again later"
    )
