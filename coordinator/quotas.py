"""What a tenant may have in all: bytes of state, and instances. An operator's choice; without one, no limit.

What must hold: what would go beyond is refused with TENANT_QUOTA, and all is as it was; what doesn't grow is
never refused, or a tenant at its limit could not even tidy up. It is counted from what this coordinator has
seen of the instances' records, which name their sizes: so commits at the same moment may together go beyond
by what they add, and none after them.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from coordinator.records import Stored, decode
from coordinator.store.base import Record
from shared.errors import Reason, RoostError
from shared.units import format_size

QUOTAS = "quotas/"


@dataclass(frozen=True, slots=True)
class Quota:
    """0: no limit."""

    tenant: str
    state_bytes: int = 0
    instances: int = 0

    def encode(self) -> bytes:
        values = asdict(self)
        del values["tenant"]
        return json.dumps(values).encode()

    @classmethod
    def decode(cls, record: Record) -> Stored[Quota]:
        return decode(
            record, lambda key, v: cls(key.removeprefix(QUOTAS), int(v["state_bytes"]), int(v["instances"]))
        )


@dataclass(frozen=True, slots=True)
class Used:
    state_bytes: int = 0
    instances: int = 0


def quota_key(tenant: str) -> str:
    return QUOTAS + tenant


def check(quota: Quota, used: Used, had: int | None, wants: int) -> None:
    """An instance of `had` bytes (None: it is new) is to have `wants`. TENANT_QUOTA if that is too much."""
    if had is None and 0 < quota.instances <= used.instances:
        raise RoostError(
            Reason.TENANT_QUOTA,
            f"tenant {quota.tenant} has {used.instances} instances, and may have {quota.instances}",
            f"`roost quota {quota.tenant} --instances N` allows more",
        )
    total = used.state_bytes - (had or 0) + wants
    if wants > (had or 0) and 0 < quota.state_bytes < total:
        raise RoostError(
            Reason.TENANT_QUOTA,
            f"the state of tenant {quota.tenant} would take {format_size(total)}, "
            f"and may take {format_size(quota.state_bytes)}",
            f"delete files in /state, or let `roost quota {quota.tenant} --bytes SIZE` allow more",
        )
