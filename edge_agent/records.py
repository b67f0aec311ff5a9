"""What the daemon must still know after a restart: one row an instance, in SQLite.

Always true: a row says what was committed (epoch, version, root) and, if `index` is there, that the
files in the jail's directory were just that when it was written, unless `busy`: then a turn was under way
and the directory may be anything. Rows are hints for speed; the coordinator's record is the truth.

How it can fail: after a power cut the files may be older than the row says (nothing here is synced, since
no process of a jail outlives the kernel either). An index knows the boot that it holds in.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from pathlib import Path

from edge_agent.control import Agent
from edge_agent.state.index import Index
from shared.identity import InstanceKey

_SCHEMA = """
CREATE TABLE IF NOT EXISTS instances (
  jail_id TEXT PRIMARY KEY, key TEXT NOT NULL, epoch INTEGER NOT NULL, version INTEGER NOT NULL,
  root TEXT NOT NULL, agent_version TEXT NOT NULL, policy_toml TEXT NOT NULL, bundle_root TEXT NOT NULL,
  busy INTEGER NOT NULL, idx TEXT
) STRICT, WITHOUT ROWID
"""


@dataclass(frozen=True, slots=True)
class NodeRecord:
    jail_id: str
    key: InstanceKey
    epoch: int
    version: int
    root: str
    agent: Agent
    busy: bool
    index: Index | None  # of the files on disk; None: not known


class Records:
    """Calls take well under a millisecond and are made directly from the event loop."""

    def __init__(self, path: Path) -> None:
        self._db = sqlite3.connect(path, isolation_level=None)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=OFF")
        self._db.execute(_SCHEMA)
        self._db.execute("CREATE UNIQUE INDEX IF NOT EXISTS by_key ON instances (key)")

    def close(self) -> None:
        self._db.close()

    def get(self, jail_id: str) -> NodeRecord | None:
        row = self._db.execute("SELECT * FROM instances WHERE jail_id = ?", (jail_id,)).fetchone()
        return self._record(row) if row else None

    def of_key(self, key: InstanceKey) -> NodeRecord | None:
        """The record of an instance; there is at most one, in whatever jail it is."""
        row = self._db.execute("SELECT * FROM instances WHERE key = ?", (str(key),)).fetchone()
        return self._record(row) if row else None

    def all(self) -> list[NodeRecord]:
        return [self._record(row) for row in self._db.execute("SELECT * FROM instances")]

    def put(self, record: NodeRecord) -> None:
        self._db.execute(
            "INSERT OR REPLACE INTO instances VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                record.jail_id,
                str(record.key),
                record.epoch,
                record.version,
                record.root,
                record.agent.version,
                record.agent.policy_toml,
                record.agent.bundle_root,
                record.busy,
                record.index.to_json() if record.index else None,
            ),
        )

    def set_busy(self, jail_id: str) -> None:
        """A turn begins: until the next `put` the directory may be anything."""
        self._db.execute("UPDATE instances SET busy = 1 WHERE jail_id = ?", (jail_id,))

    def delete(self, jail_id: str) -> None:
        self._db.execute("DELETE FROM instances WHERE jail_id = ?", (jail_id,))

    def _record(self, row: tuple[str, str, int, int, str, str, str, str, int, str | None]) -> NodeRecord:
        jail_id, key, epoch, version, root, agent_version, policy_toml, bundle_root, busy, index = row
        return NodeRecord(
            jail_id,
            InstanceKey.parse(key),
            epoch,
            version,
            root,
            Agent.of(agent_version, policy_toml, bundle_root),
            bool(busy),
            Index.from_json(index) if index else None,
        )
