"""How long this node may believe that it owns its instances (self-fencing).

Always true: the node counts from the moment it *sent* the last heartbeat that was acknowledged, so its
own view of its time runs out before the coordinator's does, whatever the network held up. At 2/3 of the
TTL it stops trusting itself; the coordinator gives its instances away only after the whole TTL.

How it can fail: the machine's monotonic clock may stand still in suspend. Then the node trusts itself for
too long, and what keeps promise 1 is the epoch, checked by the commit. Tenure only decides how soon a
node stops trying.
"""

from __future__ import annotations

TRUSTED_SHARE = 2 / 3


class Tenure:
    """Not trusted until the first acknowledgement. Times are monotonic seconds, given by the caller."""

    def __init__(self) -> None:
        self._ttl = 0.0
        self._sent: dict[int, float] = {}
        self._confirmed: float | None = None

    def welcomed(self, sent_at: float, ttl: float) -> None:
        """A coordinator took this node's registration, which was sent at `sent_at`."""
        self._ttl = ttl
        self._sent.clear()
        self._confirmed = sent_at

    def sent(self, seq: int, now: float) -> None:
        self._sent[seq] = now

    def acknowledged(self, seq: int) -> None:
        """An answer to a heartbeat of an earlier link, or to none, counts for nothing."""
        sent_at = self._sent.get(seq)
        if sent_at is None or self._confirmed is None:
            return
        self._confirmed = max(self._confirmed, sent_at)
        self._sent = {s: t for s, t in self._sent.items() if s > seq}

    def trusted_until(self) -> float:
        """-inf before the first registration."""
        if self._confirmed is None:
            return float("-inf")
        return self._confirmed + self._ttl * TRUSTED_SHARE

    def trusted(self, now: float) -> bool:
        return now < self.trusted_until()
