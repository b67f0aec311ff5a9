"""Names of instances and the tickets that let a user attach to one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from google.protobuf.message import DecodeError

from protos.v1 import common_pb2, resolver_pb2
from shared.errors import Reason, RoostError
from shared.names import NAME_RULE, is_name

USER_RULE = "use 1 to 128 of letters, digits and . _ @ + -, starting with a letter or digit"
_USER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,127}")


@dataclass(frozen=True, slots=True, order=True)
class InstanceKey:
    """The one agent of one user. BAD_REQUEST for parts that no name may have."""

    tenant: str
    agent: str
    user: str

    def __post_init__(self) -> None:
        for what, value in (("tenant", self.tenant), ("agent", self.agent)):
            if not is_name(value):
                raise RoostError(Reason.BAD_REQUEST, f"{value!r} is no {what} name", NAME_RULE)
        if not _USER.fullmatch(self.user):
            raise RoostError(Reason.BAD_REQUEST, f"{self.user!r} is no user name", USER_RULE)

    def __str__(self) -> str:
        return f"{self.tenant}/{self.agent}/{self.user}"

    def to_proto(self) -> common_pb2.InstanceKey:
        return common_pb2.InstanceKey(tenant=self.tenant, agent=self.agent, user=self.user)

    @classmethod
    def from_proto(cls, proto: common_pb2.InstanceKey) -> InstanceKey:
        return cls(proto.tenant, proto.agent, proto.user)

    @classmethod
    def parse(cls, text: str) -> InstanceKey:
        tenant, agent, user = text.split("/", 2)
        return cls(tenant, agent, user)


@dataclass(frozen=True, slots=True)
class Ticket:
    """A permission to attach to one instance on one node in one epoch, until a wall-clock time.

    The clock only bounds for how long a leaked ticket is of use; promise 1 rests on the epoch.
    """

    key: InstanceKey
    node: str
    epoch: int
    agent_version: str
    expires_at: float  # seconds since 1970


def sign_ticket(ticket: Ticket, key: Ed25519PrivateKey) -> bytes:
    """The ticket as bytes that only a holder of `key` can have made."""
    payload = resolver_pb2.Ticket(
        key=ticket.key.to_proto(),
        node=ticket.node,
        epoch=ticket.epoch,
        agent_version=ticket.agent_version,
        expires_unix_ms=round(ticket.expires_at * 1000),
    ).SerializeToString()
    return resolver_pb2.SignedTicket(ticket=payload, signature=key.sign(payload)).SerializeToString()


def verify_ticket(signed: bytes, keys: Sequence[Ed25519PublicKey], node: str, now: float) -> Ticket:
    """The ticket in `signed`, if one of `keys` signed it, for `node`, and it has not expired at `now`.

    TICKET_INVALID, TICKET_WRONG_NODE or TICKET_EXPIRED otherwise.
    """
    try:
        envelope = resolver_pb2.SignedTicket.FromString(signed)
        payload = resolver_pb2.Ticket.FromString(envelope.ticket)
    except DecodeError as error:
        raise _invalid() from error
    if not is_signed(envelope.ticket, envelope.signature, keys):
        raise _invalid()
    ticket = Ticket(
        InstanceKey.from_proto(payload.key),
        payload.node,
        payload.epoch,
        payload.agent_version,
        payload.expires_unix_ms / 1000,
    )
    if ticket.node != node:
        raise RoostError(
            Reason.TICKET_WRONG_NODE,
            f"this ticket is for node {ticket.node}, not for {node}",
            "attach to the address that came with the ticket, or resolve again",
        )
    if ticket.expires_at <= now:
        raise RoostError(
            Reason.TICKET_EXPIRED,
            f"this ticket expired {now - ticket.expires_at:.0f} s ago",
            "resolve again to get a new one; check this machine's clock if that does not help",
        )
    return ticket


def is_signed(what: bytes, signature: bytes, keys: Sequence[Ed25519PublicKey]) -> bool:
    """By one of `keys`."""
    for key in keys:
        with suppress(InvalidSignature):
            key.verify(signature, what)
            return True
    return False


def _invalid() -> RoostError:
    return RoostError(
        Reason.TICKET_INVALID,
        "this ticket was not signed by this mesh's coordinators",
        "get one from Resolver.Resolve; a ticket can't be made or changed by a client",
    )
