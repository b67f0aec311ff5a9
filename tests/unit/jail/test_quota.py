"""What is decided about a disk that fills: when to look, and how much is too much."""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path

import pytest

from edge_agent.jail import quota
from edge_agent.state.tree import Tree, TreeTooLarge, whole

MIB = 1 << 20


def test_only_a_disk_that_loses_much_is_looked_at() -> None:
    watch = quota.DiskWatch(1000 * MIB, 1_000_000)
    assert not watch.shrank(990 * MIB, 1_000_000)
    assert not watch.shrank(940 * MIB, 999_000)
    assert watch.shrank(936 * MIB, 999_000), "64 MiB in all"
    assert not watch.shrank(930 * MIB, 999_000), "counted from there"
    assert not watch.shrank(2000 * MIB, 999_000), "somebody deleted something"
    assert watch.shrank(1900 * MIB, 999_000)
    assert watch.shrank(1900 * MIB, 970_000), "files without content fill a disk, too"


def test_what_the_kernel_is_told() -> None:
    told: list[tuple[int, int, int, bytes]] = []

    def quotactl(directory: int, command: int, uid: int, data: bytearray) -> None:
        told.append((directory, command, uid, bytes(data)))

    quota.KernelQuota(7, quotactl).limit(2001, 16 * MIB)
    ((directory, command, uid, data),) = told
    assert (directory, command, uid) == (7, 0x80000800, 2001)
    hard, soft, _, most_files, *_, valid = struct.unpack("=8QI4x", data)
    assert hard == soft == 18 * 1024, "KiB: what was asked for, a sixteenth, and 1 MiB"
    assert (most_files, valid) == (quota.MAX_FILES, 5)


@pytest.mark.parametrize(("flags", "enforced"), [(0, False), (1, False), (3, True)])
def test_quotas_that_only_count_are_none(tmp_path: Path, flags: int, enforced: bool) -> None:
    def quotactl(directory: int, command: int, uid: int, data: bytearray) -> None:
        assert command == 0x580500
        struct.pack_into("=bxH", data, 0, 1, flags)

    assert (quota.kernel_quota(tmp_path, quotactl) is not None) == enforced


def test_a_file_system_without_quotas_keeps_nothing_open(tmp_path: Path) -> None:
    def quotactl(directory: int, command: int, uid: int, data: bytearray) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    before = len(os.listdir("/proc/self/fd"))
    assert quota.kernel_quota(tmp_path, quotactl) is None
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_tree_is_measured_as_far_as_needed(tmp_path: Path) -> None:
    (tmp_path / "deep/er").mkdir(parents=True)
    (tmp_path / "deep/er/file").write_bytes(bytes(100_000))
    (tmp_path / "sparse").touch()
    os.truncate(tmp_path / "sparse", 1 << 40)
    (tmp_path / "link").symlink_to("/usr")
    root = os.open(tmp_path, os.O_RDONLY)
    before = len(os.listdir("/proc/self/fd"))
    try:
        assert 100_000 <= whole(Tree(root).taken(1 << 30, 100)) < 300_000, "holes and links take nothing"
        assert 50_000 < whole(Tree(root).taken(50_000, 100)) < 300_000
        with pytest.raises(TreeTooLarge):
            whole(Tree(root).taken(1 << 30, 3))
        deepest = tmp_path
        os.chdir(tmp_path)
        for _ in range(210):
            os.mkdir("d")
            os.chdir("d")
        with pytest.raises(TreeTooLarge):
            whole(Tree(root).taken(1 << 30, 10_000))
        assert len(os.listdir("/proc/self/fd")) == before
    finally:
        os.chdir(deepest.parent)
        os.close(root)
