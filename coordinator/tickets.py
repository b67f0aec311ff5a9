"""Tickets, signed with the one key of the mesh, which the first coordinator makes."""

from __future__ import annotations

from collections.abc import Callable

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from coordinator.records import SIGNING_KEY, InstanceRecord, decode_signing_key, encode_signing_key
from coordinator.store.base import Expect, Put, Store
from shared import peer_tickets
from shared.errors import Reason, RoostError
from shared.identity import Ticket, sign_ticket


async def load_signing_key(store: Store) -> Ed25519PrivateKey:
    """The mesh's key; made now if there is none. STORE_UNAVAILABLE; then call it again."""
    fresh = encode_signing_key(Ed25519PrivateKey.generate().private_bytes_raw())
    await store.txn([Expect(SIGNING_KEY, 0)], [Put(SIGNING_KEY, fresh)])
    # Read in any case: another coordinator may have been first, or this one in an attempt that was cut off.
    record = await store.get(SIGNING_KEY)
    if record is None:
        raise RoostError(Reason.STORE_UNAVAILABLE, "the signing key was deleted while it was being made")
    return Ed25519PrivateKey.from_private_bytes(decode_signing_key(record))


class Tickets:
    """Issues them, once `load` has succeeded."""

    def __init__(self, store: Store, lifetime: float, clock_unix: Callable[[], float]) -> None:
        """`lifetime` in seconds."""
        self._store = store
        self._lifetime = lifetime
        self._clock_unix = clock_unix
        self._keys: list[Ed25519PrivateKey] = []

    async def load(self) -> None:
        """STORE_UNAVAILABLE; then call it again."""
        self._keys = [await load_signing_key(self._store)]

    @property
    def public_keys(self) -> list[bytes]:
        return [key.public_key().public_bytes_raw() for key in self._keys]

    def for_peer(self, asker: str, asked: str, site: str, lifetime: float) -> bytes:
        """A permission for one node to ask another of its site for copies, for `lifetime` seconds."""
        ticket = peer_tickets.PeerTicket(asker, asked, site, self._clock_unix() + lifetime)
        return peer_tickets.sign(ticket, self._keys[0])

    def issue(self, record: InstanceRecord) -> bytes:
        """A permission to attach to the instance where `record` says that it is."""
        ticket = Ticket(
            record.key,
            record.node,
            record.epoch,
            record.agent_version,
            self._clock_unix() + self._lifetime,
        )
        return sign_ticket(ticket, self._keys[0])
