"""What the daemon must still know after a restart: one row an instance, in SQLite.

Always true: a row says what was committed (epoch, version, root) and, if `index` is there, that the
files in the jail's directory were just that when it was written, unless `busy`: then a turn was under way
(or had just been committed and answered), and the directory may be anything. Rows are hints for speed; the
coordinator's record is the truth.

How it can fail: after a power cut the files may be older than the row says (nothing here is synced, since
no process of a jail outlives the kernel either). An index knows the boot that it holds in.
"""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from edge_agent.control import Agent
from shared.errors import Reason, RoostError
from shared.identity import InstanceKey

log = logging.getLogger(__name__)

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
    index: str | None  # of the files on disk, as `Index.to_json` has it; None: not known


@dataclass(frozen=True, slots=True)
class Held:
    jail_id: str
    key: InstanceKey
    epoch: int
    version: int


class Records:
    """Calls take well under a millisecond and are made directly from the event loop.

    NODE_FAILED when the disk is full or broken. A file that is damaged is set aside, and a row that makes no
    sense is dropped: they are hints, and a node must start without them.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._db = _open(path)
        except sqlite3.DatabaseError as error:
            log.warning("%s is damaged (%s): set aside, and begun anew", path, error)
            for suffix in ("", "-wal", "-shm"):
                with suppress(FileNotFoundError):
                    os.replace(f"{path}{suffix}", f"{path}.damaged{suffix}")
            self._db = _open(path)
        # All that have a row, and maybe some that had one: most starts ask for one that has not.
        self._jails = {jail_id for (jail_id,) in self._db.execute("SELECT jail_id FROM instances")}

    def close(self) -> None:
        self._db.close()

    def get(self, jail_id: str) -> NodeRecord | None:
        if jail_id not in self._jails:
            return None
        with _told():
            row = self._db.execute("SELECT * FROM instances WHERE jail_id = ?", (jail_id,)).fetchone()
        if row is None:
            return None
        try:
            return _record(row)
        except (RoostError, ValueError) as error:
            log.warning("the record of jail %s is dropped: %s", jail_id, error)
            self.delete(jail_id)
            return None

    def held(self) -> list[Held]:
        with _told():
            rows = self._db.execute("SELECT jail_id, key, epoch, version FROM instances").fetchall()
        return [
            Held(jail_id, InstanceKey.parse(key), epoch, version) for jail_id, key, epoch, version in rows
        ]

    def of_key(self, key: InstanceKey) -> NodeRecord | None:
        """The record of an instance; there is at most one, in whatever jail it is."""
        with _told():
            row = self._db.execute("SELECT jail_id FROM instances WHERE key = ?", (str(key),)).fetchone()
        return self.get(row[0]) if row else None

    def put(self, record: NodeRecord) -> None:
        with _told():
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
                    record.index,
                ),
            )
        self._jails.add(record.jail_id)

    def set_busy(self, jail_id: str) -> None:
        """A turn begins: until the next `put` the directory may be anything."""
        with _told():
            self._db.execute("UPDATE instances SET busy = 1 WHERE jail_id = ?", (jail_id,))

    def delete(self, jail_id: str) -> None:
        with _told():
            self._db.execute("DELETE FROM instances WHERE jail_id = ?", (jail_id,))
        self._jails.discard(jail_id)


def _open(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, isolation_level=None)
    try:
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=OFF")
        faults = db.execute("PRAGMA quick_check").fetchone()
        if faults != ("ok",):
            raise sqlite3.DatabaseError(faults)  # noqa: TRY301
        db.execute(_SCHEMA)
        db.execute("CREATE UNIQUE INDEX IF NOT EXISTS by_key ON instances (key)")
        db.execute("SELECT jail_id, key, epoch, version, root, busy, idx FROM instances LIMIT 1")
    except sqlite3.DatabaseError:
        db.close()
        raise
    return db


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise RoostError(
            Reason.NODE_FAILED, f"this node's records can't be used: {error}", "is its disk full or broken?"
        ) from error


def _record(row: tuple[str, str, int, int, str, str, str, str, int, str | None]) -> NodeRecord:
    jail_id, key, epoch, version, root, agent_version, policy_toml, bundle_root, busy, index = row
    agent = Agent.of(agent_version, policy_toml, bundle_root)
    return NodeRecord(jail_id, InstanceKey.parse(key), epoch, version, root, agent, bool(busy), index)
