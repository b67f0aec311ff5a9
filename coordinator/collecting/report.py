"""What a pass of collecting found and did, as it is kept and told."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from coordinator.records import Stored
from coordinator.store.base import Record
from protos.v1 import state_pb2


@dataclass(frozen=True, slots=True)
class Report:
    """What a pass found and did. `round` 0: it only looked."""

    round: int = 0
    collector: str = ""
    began_unix: float = 0.0
    seconds: float = 0.0
    needed: int = 0
    blobs: int = 0
    total_bytes: int = 0
    condemned: int = 0
    condemned_bytes: int = 0
    purged: int = 0
    purged_bytes: int = 0
    rescued: int = 0
    missing: int = 0
    missing_some: tuple[str, ...] = ()
    error: str = ""

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def decode(cls, record: Record) -> Stored[Report]:
        """An empty one for what can't be read: it is for people."""
        try:
            fields = json.loads(record.value)
            report = cls(**{**fields, "missing_some": tuple(fields["missing_some"])})
        except (ValueError, TypeError, KeyError):
            report = cls(error="the last report can't be read")
        return Stored(report, record.revision)

    def to_proto(self) -> state_pb2.Collection:
        fields = asdict(self)
        fields["coordinator"], fields["bytes"] = fields.pop("collector"), fields.pop("total_bytes")
        return state_pb2.Collection(**fields)
