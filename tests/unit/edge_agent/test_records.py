"""The node's records are hints: whatever becomes of their file, the node starts."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from edge_agent.records import NodeRecord, Records
from shared.errors import Reason, RoostError
from shared.identity import InstanceKey
from tests.support.fake_control import AGENT

KEY = InstanceKey("default", "probe", "ana")
RECORD = NodeRecord("probe-ana", KEY, 3, 7, "root", AGENT, False, '{"files": {}}')


def test_what_was_put_is_there_after_a_restart(tmp_path: Path) -> None:
    records = Records(tmp_path / "records.db")
    records.put(RECORD)
    records.close()
    again = Records(tmp_path / "records.db")
    assert again.get("probe-ana") == RECORD
    assert [(h.jail_id, h.key, h.epoch, h.version) for h in again.held()] == [("probe-ana", KEY, 3, 7)]
    again.set_busy("probe-ana")
    busy = again.get("probe-ana")
    assert busy is not None
    assert busy.busy
    again.delete("probe-ana")
    assert again.get("probe-ana") is None


@pytest.mark.parametrize("damage", [b"", b"no database at all" * 100, b"SQLite format 3\0" + b"\xff" * 4096])
def test_a_damaged_file_is_set_aside(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "records.db"
    records = Records(path)
    records.put(RECORD)
    records.close()
    for leftover in tmp_path.glob("records.db-*"):
        leftover.unlink()
    path.write_bytes(damage)
    again = Records(path)
    assert again.held() == []
    again.put(RECORD)
    assert again.get("probe-ana") == RECORD


def test_an_older_schema_is_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "records.db"
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE instances (jail_id TEXT)")
    db.close()
    assert Records(path).held() == []


def test_a_row_that_makes_no_sense_is_dropped(tmp_path: Path) -> None:
    records = Records(tmp_path / "records.db")
    records.put(RECORD)
    records._db.execute("UPDATE instances SET policy_toml = 'nonsense'")
    assert records.get("probe-ana") is None
    assert records.held() == []


def test_a_full_disk_is_said_as_such(tmp_path: Path) -> None:
    records = Records(tmp_path / "records.db")
    records._db.execute("PRAGMA max_page_count = 2")
    with pytest.raises(RoostError, match="full") as caught:
        records.put(replace(RECORD, root="r" * 100_000))
    assert caught.value.reason is Reason.NODE_FAILED
