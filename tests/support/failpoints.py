"""Which failpoints there are, and arming them in a process of a test."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]

COORDINATOR = (
    "coordinator.place.before_reservation",
    "coordinator.place.reserved",
    "coordinator.place.before_txn",
    "coordinator.place.after_txn",
    "coordinator.resolve.before_answer",
    "coordinator.fetch.before_answer",
    "coordinator.commit.before_txn",
    "coordinator.commit.before_answer",
    "coordinator.blob.before_rename",
    "coordinator.blob.renamed",
)
NODE = (
    "node.turn.taken",
    "node.turn.before_agent",
    "node.turn.replied",
    "node.commit.captured",
    "node.commit.before_upload",
    "node.commit.before_call",
    "node.commit.answered",
    "node.commit.told",
    "node.commit.recorded",
    "node.start.before_restore",
    "node.start.restored",
    "node.start.started",
    "node.sleep.before_end",
    "node.sleep.before_tell",
)
ALL = (*COORDINATOR, *NODE)


def in_source() -> list[str]:
    """Those that the daemons call, in no order."""
    files = [f for part in ("coordinator", "edge_agent", "shared") for f in (ROOT / part).rglob("*.py")]
    calls = (re.findall(r'^ +failpoint\("(.+)"\)', f.read_text(), re.MULTILINE) for f in files)
    return [name for found in calls for name in found]


class Failpoints:
    """Those of one process, which was started with ROOST_FAILPOINTS naming `directory`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @property
    def ready(self) -> bool:
        """Has the process begun to look there?"""
        return self._directory.is_dir()

    def arm(self, name: str, action: str) -> None:
        """`action` as `shared.failpoints` has it. Comes into force at once."""
        partial = self._directory / ".partial"
        partial.write_text(action)
        partial.rename(self._directory / name)

    def armed(self, name: str) -> bool:
        """Has it not been reached yet?"""
        return (self._directory / name).exists()

    def disarm(self, name: str) -> bool:
        """Was it still armed?"""
        try:
            (self._directory / name).unlink()
        except FileNotFoundError:
            return False
        return True
