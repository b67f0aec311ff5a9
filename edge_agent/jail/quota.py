"""What a jail's /state takes of the disk: limited by the kernel where it can, measured where it can't.

By the kernel: quotas for users. Every jail's agent has a uid of its own, so a limit for that uid is one for
the jail, whatever it does with its files. The file system must have been mounted with them (`usrquota`).

Otherwise: once a second the jailer looks whether the disk has lost room, and only then has somebody measure
what is in /state (`DiskWatch`). What must hold: nothing here waits, and a box where nobody writes pays one
`statvfs` a second. How it can fail: for a second or two a jail may write as fast as the disk can; and files
that are deleted but open are not seen.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

from edge_agent.jail import kernel

WATCH_SECONDS = 1.0
_STEP_BYTES, _STEP_FILES = 64 << 20, 20_000  # lost since the last look
MAX_FILES = 200_000  # of one jail: twice as many as can be committed

_USER = 0
_SET_QUOTA, _GET_STATE = 0x800008, 0x5805  # Q_SETQUOTA, Q_XGETQSTAT
_ENFORCED = 2  # FS_QUOTA_UDQ_ENFD
_BLOCK_LIMITS, _FILE_LIMITS = 1, 4  # of `valid` in struct if_dqblk
_BLOCK = 1024  # bytes

Call = Callable[[int, int, int, bytearray], None]


class KernelQuota:
    """Of the file system of one directory. OSError for what the kernel refuses."""

    def __init__(self, directory: int, call: Call = kernel.quotactl) -> None:
        """`directory`: a descriptor, which is kept."""
        self._directory = directory
        self._call = call

    def limit(self, uid: int, most_bytes: int) -> None:
        """What there is already counts, and stays if it is more."""
        blocks = most_taken(most_bytes) // _BLOCK
        limits = struct.pack(
            "=8QI4x", blocks, blocks, 0, MAX_FILES, MAX_FILES, 0, 0, 0, _BLOCK_LIMITS | _FILE_LIMITS
        )
        self._call(self._directory, _SET_QUOTA << 8 | _USER, uid, bytearray(limits))


def kernel_quota(directory: Path, call: Call = kernel.quotactl) -> KernelQuota | None:
    """None if the file system of `directory` has no quotas for users, or does not enforce them."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    state = bytearray(256)  # struct fs_quota_stat
    try:
        call(fd, _GET_STATE << 8 | _USER, 0, state)
        if struct.unpack_from("=H", state, 2)[0] & _ENFORCED:
            return KernelQuota(fd, call)
    except OSError:
        pass
    os.close(fd)
    return None


def most_taken(most_bytes: int) -> int:
    """Bytes of the disk, whole blocks and directories too, that files of `most_bytes` surely fit in."""
    return most_bytes + most_bytes // 16 + (1 << 20)


class DiskWatch:
    """Tells when the file system has lost so much room since the last time that somebody may be to blame."""

    def __init__(self, free_bytes: int, free_files: int) -> None:
        self._bytes = free_bytes
        self._files = free_files

    def shrank(self, free_bytes: int, free_files: int) -> bool:
        lost = self._bytes - free_bytes >= _STEP_BYTES or self._files - free_files >= _STEP_FILES
        if lost or free_bytes > self._bytes:
            self._bytes = free_bytes
        if lost or free_files > self._files:
            self._files = free_files
        return lost


def free(directory: Path) -> tuple[int, int]:
    """Bytes and files that the file system of `directory` has room for."""
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize, status.f_ffree
