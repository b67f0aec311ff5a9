"""What a client was told and is no longer so. Pure.

Always true: a turn that a client was given a receipt of, and that is not in the state which its next turn
builds on, is named as lost. How it can fail: turns of MAX_TURNS versions ago are on no record; such a receipt
counts as kept, since it is far more likely that it is.
"""

from __future__ import annotations

from dataclasses import dataclass

from protos.v1 import attach_pb2
from shared.manifest import MAX_TURNS, StateManifest


@dataclass(frozen=True, slots=True)
class Given:
    """The last receipt that a client was given of a turn that made a `version`."""

    turn_id: str
    node: str
    version: int
    durable: bool

    @classmethod
    def from_proto(cls, proto: attach_pb2.Given) -> Given:
        return cls(proto.turn_id, proto.node, proto.version, proto.durable)


def lost(given: Given | None, found: StateManifest) -> list[str]:
    """In words, what of the `given` is not in what was `found`."""
    if given is None or given.version == 0 or found.turn(given.turn_id) is not None:
        return []
    if found.version - given.version >= MAX_TURNS:
        return []
    first = min(found.version + 1, given.version)  # the latter: another turn has taken its place since
    many = first < given.version
    versions = f"versions {first} to {given.version}" if many else f"version {first}"
    when = "as committed" if given.durable else f"before {'they were' if many else 'it was'} committed"
    return [f"{versions}, which {given.node} acknowledged {when}"]
