"""Permissions for one node of a site to ask another for copies of state.

A ticket names who may ask whom, so that one that leaks is of use at one node alone, and for minutes. It is
signed by the key that signs users' tickets, behind a prefix: neither can be taken for the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from google.protobuf.message import DecodeError

from protos.v1 import site_pb2
from shared.errors import Reason, RoostError
from shared.identity import is_signed

METADATA = "roost-peer-ticket-bin"
_PREFIX = b"roost peer ticket\0"


@dataclass(frozen=True, slots=True)
class PeerTicket:
    asker: str
    asked: str
    site: str
    expires_at: float  # seconds since 1970


def sign(ticket: PeerTicket, key: Ed25519PrivateKey) -> bytes:
    payload = site_pb2.PeerTicket(
        **{"from": ticket.asker},
        to=ticket.asked,
        site=ticket.site,
        expires_unix_ms=round(ticket.expires_at * 1000),
    ).SerializeToString()
    signature = key.sign(_PREFIX + payload)
    return site_pb2.SignedPeerTicket(ticket=payload, signature=signature).SerializeToString()


def verify(signed: bytes, keys: Sequence[Ed25519PublicKey], node: str, site: str, now: float) -> PeerTicket:
    """The ticket in `signed`, if it lets somebody ask `node` of `site` at `now`. TICKET_INVALID,
    TICKET_WRONG_NODE or TICKET_EXPIRED otherwise."""
    try:
        envelope = site_pb2.SignedPeerTicket.FromString(signed)
        payload = site_pb2.PeerTicket.FromString(envelope.ticket)
    except DecodeError as error:
        raise _invalid() from error
    if not is_signed(_PREFIX + envelope.ticket, envelope.signature, keys):
        raise _invalid()
    ticket = PeerTicket(getattr(payload, "from"), payload.to, payload.site, payload.expires_unix_ms / 1000)
    if (ticket.asked, ticket.site) != (node, site):
        raise RoostError(
            Reason.TICKET_WRONG_NODE,
            f"this ticket is for asking {ticket.asked} of site {ticket.site}, not {node} of {site}",
            "a node's coordinator gives it one for each other node of its site",
        )
    if ticket.expires_at <= now:
        raise RoostError(
            Reason.TICKET_EXPIRED,
            f"this ticket expired {now - ticket.expires_at:.0f} s ago",
            "the coordinator sends new ones in time; check both machines' clocks",
        )
    return ticket


def _invalid() -> RoostError:
    return RoostError(
        Reason.TICKET_INVALID,
        "this call has no ticket that this mesh's coordinators signed",
        "only nodes of this site may ask, with the tickets that their coordinator gives them",
    )
