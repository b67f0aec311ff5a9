"""The node's directories of jails, and the slot (a pair of uids) of each.

    <data_dir>            root 0711
      jails/<jail_id>/    root 0711
        state/            the agent's uid 0700: its owner says which slot the jail has
      bundles/<version>/  the daemon's
      daemon/             the daemon's, 0700
      root/               empty

What must hold: a slot is given to another jail only when no file of its uids is left. Names have been checked
by the protocol; the directories above `state` belong to root, so nobody can put a link in their place.
"""

from __future__ import annotations

import heapq
import os
from contextlib import suppress
from pathlib import Path

from edge_agent.jail.config import MAX_SLOTS, JailerConfig
from edge_agent.jail.protocol import Refused
from edge_agent.jail.quota import KernelQuota, kernel_quota

_TRASH = ".trash-"
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Slots:
    """Which slots are taken. The lowest free one is given first."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._next = 0
        self._returned: list[int] = []
        self._taken: set[int] = set()

    def mark(self, slot: int) -> None:
        """`slot` is taken already."""
        self._taken.add(slot)

    def take(self) -> int:
        """Refused when there is none left."""
        while self._returned or self._next < self._count:
            if self._returned:
                slot = heapq.heappop(self._returned)
            else:
                slot, self._next = self._next, self._next + 1
            if slot not in self._taken:
                self._taken.add(slot)
                return slot
        raise Refused(
            f"this node has {self._count:,} directories of jails, and no uids for more",
            "discard those of instances that live elsewhere now",
        )

    def release(self, slot: int) -> None:
        self._taken.discard(slot)
        if slot < self._next:
            heapq.heappush(self._returned, slot)


class Directories:
    def __init__(self, config: JailerConfig) -> None:
        self._config = config
        self._jails = config.jails_dir
        self._slots = Slots(MAX_SLOTS)
        self._slot_of: dict[str, int] = {}
        self._trashed = 0
        self.quota: KernelQuota | None = None

    def prepare(self) -> list[Path]:
        """Makes what is missing, learns what is there, and returns what a predecessor had begun to remove."""
        c = self._config
        c.data_dir.mkdir(parents=True, exist_ok=True)
        for path, mode, uid, gid in (
            (c.data_dir, 0o711, 0, 0),
            (c.jails_dir, 0o711, 0, 0),
            (c.new_root, 0o711, 0, 0),
            (c.bundles_dir, 0o755, c.daemon_uid, c.daemon_gid),
            (c.daemon_dir, 0o700, c.daemon_uid, c.daemon_gid),
        ):
            path.mkdir(exist_ok=True)
            fd = os.open(path, _DIRECTORY)
            os.fchown(fd, uid, gid)
            os.fchmod(fd, mode)
            os.close(fd)
        trash = []
        for name in sorted(os.listdir(self._jails)):
            path = self._jails / name
            slot = self._slot_on_disk(path)
            if slot is not None:
                self._slots.mark(slot)
            if name.startswith(_TRASH):
                trash.append(path)
            elif slot is not None:
                self._slot_of[name] = slot
        self.quota = kernel_quota(self._jails)
        return trash

    def path_of(self, jail_id: str) -> Path:
        return self._jails / jail_id

    def ensure(self, jail_id: str) -> int:
        """The slot of the jail, whose directory is made if it is not there."""
        known = self._slot_of.get(jail_id)
        if known is not None:
            return known
        slot = self._slots.take()
        path = self._jails / jail_id
        for directory, mode in ((path, 0o711), (path / "state", 0o700)):
            directory.mkdir(mode=mode, exist_ok=True)
        owner = (path / "state").lstat().st_uid
        if owner != 0:  # root's: made just now, or by a predecessor that ended before the chown
            self._slots.release(slot)
            raise Refused(
                f"the state of jail {jail_id} belongs to uid {owner}, which is none of this node's",
                "was jailer.uid_base changed? set it back, or discard the directory",
            )
        os.chown(path / "state", self._config.agent_uid(slot), self._config.agent_uid(slot))
        self._slot_of[jail_id] = slot
        return slot

    def lend(self) -> int:
        """A slot for a jail that leaves no files, until it is given back."""
        return self._slots.take()

    def give_back(self, slot: int) -> None:
        self._slots.release(slot)

    def limit(self, slot: int, most_bytes: int) -> None:
        """What the jail's agent may have on the disk, where the kernel enforces it."""
        if self.quota is not None:
            self.quota.limit(self._config.agent_uid(slot), most_bytes)

    def listing(self, after: str, count: int) -> list[str]:
        names = (n for n in os.listdir(self._jails) if not n.startswith(_TRASH) and n > after)
        return heapq.nsmallest(count, names)

    def trash(self, jail_id: str) -> Path | None:
        """Takes the jail's directory out of sight, to be removed. None: there was none."""
        self._trashed += 1
        path = self._jails / f"{_TRASH}{os.getpid()}-{self._trashed}-{jail_id}"
        try:
            os.rename(self._jails / jail_id, path)
        except FileNotFoundError:
            return None
        self._slot_of.pop(jail_id, None)
        return path

    def slot_in(self, trash: Path) -> int | None:
        return self._slot_on_disk(trash)

    def removed(self, trash: Path, slot: int | None) -> bool:
        """Gives back the slot of what was trashed, if it is really gone."""
        if trash.exists():
            return False
        if slot is not None:
            self._slots.release(slot)
        return True

    def _slot_on_disk(self, path: Path) -> int | None:
        with suppress(FileNotFoundError):
            return self._config.slot_of((path / "state").lstat().st_uid)
        return None
