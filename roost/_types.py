"""What a chat gives back."""

from __future__ import annotations

from dataclasses import dataclass

from protos.v1 import common_pb2


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a reply rests on. `lost` is empty unless a reply that this chat was given before is not true any
    more, or something committed could not be restored."""

    node: str
    epoch: int
    version: int  # of the state, made by this turn
    resumed_from: str  # "new", "live", "disk" or "blobs"
    resumed_version: int  # the state version that the turn built on
    lost: tuple[str, ...]
    replayed: bool  # the turn had been applied before; this is its recorded reply
    durable: bool  # False: the reply was given out before its commit (durability = "async")

    @classmethod
    def from_proto(cls, proto: common_pb2.Receipt) -> Receipt:
        return cls(
            proto.node,
            proto.epoch,
            proto.version,
            common_pb2.ResumedFrom.Name(proto.resumed_from).lower(),
            proto.resumed_version,
            tuple(proto.lost),
            proto.replayed,
            proto.durable,
        )


@dataclass(frozen=True, slots=True)
class Delta:
    """A provisional piece of a reply."""

    text: str


@dataclass(frozen=True, slots=True)
class Waiting:
    """What the turn waits for before it begins, in words: such as the agent's packages being unpacked."""

    text: str


@dataclass(frozen=True, slots=True)
class Restarted:
    """All deltas of this turn so far are void: the turn is tried again."""


@dataclass(frozen=True, slots=True)
class Reply:
    """The whole reply, committed if its receipt says durable. `why` says in words why the instance is where
    it is."""

    text: str
    receipt: Receipt
    turn_id: str
    why: str


Event = Waiting | Delta | Restarted | Reply
