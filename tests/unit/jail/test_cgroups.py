"""Control groups on a tree of plain files: what is written where, and which kind is chosen."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from edge_agent.jail import cgroups
from edge_agent.jail.cgroups.freezing import Freezing
from edge_agent.jail.cgroups.v1 import CONTROLLERS, V1
from edge_agent.jail.cgroups.v2 import V2
from edge_agent.jail.protocol import Limits, Refused

LIMITS = Limits(memory_bytes=64 << 20, cpu_millis=1500, pids=10)
SLOW_DISK = Limits(memory_bytes=64 << 20, cpu_millis=1500, pids=10, read_bps=5 << 20)


def _read(path: Path) -> str:
    return path.read_text().strip()


def _v2(tmp_path: Path, supervised: bool = False) -> V2:
    (tmp_path / "cgroup.subtree_control").touch()
    return V2(tmp_path, "roost-x", supervised)


def _v1(tmp_path: Path, *more: str) -> V1:
    for name in (*CONTROLLERS, *more):
        (tmp_path / name).mkdir()
        (tmp_path / name / "cgroup.procs").touch()
    return V1(tmp_path, "roost-x", "8:0")


def test_v2_enables_controllers_down_to_the_parent_of_jails(tmp_path: Path) -> None:
    _v2(tmp_path).sweep()
    for group in (tmp_path, tmp_path / "roost-x"):
        assert _read(group / "cgroup.subtree_control") == "+memory +cpu +pids"


def test_v2_leaves_a_delegated_group_before_it_enables_controllers_there(tmp_path: Path) -> None:
    _v2(tmp_path, supervised=True).sweep()
    assert _read(tmp_path / "supervisor/cgroup.procs") == "0"


def test_v2_limits(tmp_path: Path) -> None:
    groups = _v2(tmp_path)
    groups.sweep()
    groups.create("a", LIMITS)
    jail = tmp_path / "roost-x/a"
    assert (jail / "agent").is_dir()
    assert not (jail / "cgroup.subtree_control").exists(), "so that init may live beside its subgroup"
    written = {name: _read(jail / name) for name in os.listdir(jail) if name != "agent"}
    assert written == {
        "memory.max": str(64 << 20),
        "memory.high": str(60 << 20),
        "memory.swap.max": "0",
        "cpu.max": "150000 100000",
        "cpu.weight": "150",
        "pids.max": "11",
    }


def test_v2_freezes_the_agent_alone(tmp_path: Path) -> None:
    groups = _v2(tmp_path)
    groups.sweep()
    groups.create("a", LIMITS)
    agent = tmp_path / "roost-x/a/agent"
    (agent / "cgroup.freeze").write_text("0\n")
    (agent / "cgroup.events").write_text("populated 1\nfrozen 0\n")
    freezing = Freezing(groups.open_freezer("a"))
    assert not freezing.freeze()
    assert _read(agent / "cgroup.freeze") == "1"
    assert not freezing.frozen()
    (agent / "cgroup.events").write_text("populated 1\nfrozen 1\n")
    assert freezing.frozen()
    assert freezing.freeze()
    freezing.thaw()
    assert _read(agent / "cgroup.freeze") == "0"
    freezing.close()


def test_v2_opens_all_of_a_freezer_or_nothing(tmp_path: Path) -> None:
    groups = _v2(tmp_path)
    groups.sweep()
    groups.create("a", LIMITS)
    (tmp_path / "roost-x/a/agent/cgroup.freeze").touch()
    before = os.listdir("/proc/self/fd")
    with pytest.raises(FileNotFoundError, match=r"cgroup\.events"):
        groups.open_freezer("a")
    assert os.listdir("/proc/self/fd") == before


def test_v1_freezes_the_agent_alone(tmp_path: Path) -> None:
    groups = _v1(tmp_path)
    groups.sweep()
    groups.create("a", LIMITS)
    state = tmp_path / "freezer/roost-x/a/agent/freezer.state"
    state.write_text("THAWED\n")
    freezing = Freezing(groups.open_freezer("a"))
    assert freezing.freeze()
    assert _read(state) == "FROZEN"
    freezing.thaw()
    assert _read(state) == "THAWED"
    assert not freezing.frozen()
    assert _read(state) == "FROZEN", "v1 looks again only when it is asked again"
    groups.kill("a")
    assert _read(state) == "THAWED", "so that they die"
    freezing.close()


@pytest.mark.parametrize("number", [0, 3])
def test_what_is_no_freezer_is_refused_and_stays_the_callers(number: int) -> None:
    fds = tuple(os.open("/dev/null", os.O_RDWR) for _ in range(number))
    with pytest.raises(ValueError, match=str(number)):
        Freezing(fds)
    for fd in fds:
        os.close(fd)


def test_a_freezer_is_closed_once() -> None:
    freezing = Freezing((os.open("/dev/null", os.O_RDWR),))
    freezing.close()
    other = os.open("/dev/null", os.O_RDONLY)  # which gets its number
    freezing.close()
    assert freezing.closed
    os.close(other)


def test_v2_accounts(tmp_path: Path) -> None:
    groups = _v2(tmp_path)
    groups.sweep()
    groups.create("a", LIMITS)
    jail = tmp_path / "roost-x/a"
    (jail / "memory.current").write_text("4096\n")
    (jail / "cpu.stat").write_text("usage_usec 2500000\nuser_usec 1\nsystem_usec 2\n")
    (jail / "pids.current").write_text("3\n")
    (jail / "memory.events").write_text("low 0\nhigh 7\nmax 5\noom 2\noom_kill 1\n")
    usage = groups.usage("a")
    assert (usage.memory_bytes, usage.cpu_seconds, usage.pids) == (4096, 2.5, 3)
    assert groups.oom_kills("a") == 1
    assert groups.oom_kills("gone") == 0


def test_v2_kills_through_the_group_where_the_kernel_can(tmp_path: Path) -> None:
    groups = _v2(tmp_path)
    groups.sweep()
    groups.create("a", LIMITS)
    (tmp_path / "roost-x/a/cgroup.kill").touch()
    groups.kill("a")
    assert _read(tmp_path / "roost-x/a/cgroup.kill") == "1"
    groups.kill("never-was")


def test_v2_removes_what_is_empty(tmp_path: Path) -> None:
    groups = _v2(tmp_path)
    groups.sweep()
    (tmp_path / "roost-x/a/agent").mkdir(parents=True)
    (tmp_path / "roost-x/a/agent/busy").touch()  # as a process would, it keeps the directory
    assert not groups.remove("a")
    (tmp_path / "roost-x/a/agent/busy").unlink()
    assert groups.remove("a")
    assert groups.remove("a"), "again, without harm"


def test_v1_limits_in_every_tree(tmp_path: Path) -> None:
    groups = _v1(tmp_path)
    groups.sweep()
    groups.create("a", LIMITS)
    assert _read(tmp_path / "memory/roost-x/a/memory.limit_in_bytes") == str(64 << 20)
    assert _read(tmp_path / "memory/roost-x/a/memory.memsw.limit_in_bytes") == str(64 << 20)
    assert _read(tmp_path / "memory/roost-x/a/memory.soft_limit_in_bytes") == str(60 << 20)
    assert _read(tmp_path / "cpu/roost-x/a/cpu.cfs_quota_us") == "150000"
    assert _read(tmp_path / "cpu/roost-x/a/cpu.shares") == "1536"
    assert _read(tmp_path / "pids/roost-x/a/pids.max") == "11"
    assert (tmp_path / "freezer/roost-x/a/agent").is_dir()


def test_v1_limits_the_disk_of_those_alone_that_ask_for_it(tmp_path: Path) -> None:
    groups = _v1(tmp_path, "blkio")
    groups.sweep()
    assert groups.limits_io
    groups.create("a", SLOW_DISK)
    assert _read(tmp_path / "blkio/roost-x/a/blkio.throttle.read_bps_device") == f"8:0 {5 << 20}"
    assert _read(tmp_path / "blkio/roost-x/a/blkio.throttle.write_bps_device") == "8:0 0", "0 lifts it"
    groups.create("b", LIMITS)
    assert not (tmp_path / "blkio/roost-x/b").exists(), "which takes time at its start"
    for jail_id in "ab":
        groups.join(jail_id)
    assert _read(tmp_path / "blkio/roost-x/a/tasks") == "0"


def test_v1_without_the_controller_limits_no_disk(tmp_path: Path) -> None:
    groups = _v1(tmp_path)
    assert not groups.limits_io
    groups.sweep()
    groups.create("a", SLOW_DISK)
    groups.join("a")


def test_v2_limits_the_disk(tmp_path: Path) -> None:
    (tmp_path / "cgroup.subtree_control").touch()
    groups = V2(tmp_path, "roost-x", False, "254:16")
    groups.sweep()
    assert _read(tmp_path / "roost-x/cgroup.subtree_control") == "+io"
    groups.create("a", SLOW_DISK)
    assert _read(tmp_path / "roost-x/a/io.max") == f"254:16 rbps={5 << 20} wbps=max"
    assert groups.limits_io


def test_a_partition_is_limited_as_the_disk_that_it_is_on(tmp_path: Path) -> None:
    device = (tmp_path / "x").parent.stat().st_dev
    numbers = f"{os.major(device)}:{os.minor(device)}"
    assert cgroups.disk_of(tmp_path, tmp_path) is None, "no block device"
    partition = tmp_path / "devices/sda/sda1"
    partition.mkdir(parents=True)
    (tmp_path / "devices/sda/dev").write_text("8:0\n")
    (partition / "dev").write_text("8:1\n")
    (tmp_path / "dev/block").mkdir(parents=True)
    (tmp_path / "dev/block" / numbers).symlink_to(partition)
    assert cgroups.disk_of(tmp_path, tmp_path) == "8:1"
    (partition / "partition").write_text("1\n")
    assert cgroups.disk_of(tmp_path, tmp_path) == "8:0"


def test_v1_never_sets_the_smaller_limit_above_the_larger(tmp_path: Path) -> None:
    groups = _v1(tmp_path)
    groups.sweep()
    groups.create("a", LIMITS)
    memory = tmp_path / "memory/roost-x/a"
    for size in (128 << 20, 32 << 20):
        limits = dataclasses.replace(LIMITS, memory_bytes=size)
        if size < 64 << 20:
            assert groups.shrink("a", limits)
        groups.limit("a", limits)
        assert _read(memory / "memory.limit_in_bytes") == str(size)
        assert _read(memory / "memory.memsw.limit_in_bytes") == str(size)


def test_v2_presses_memory_down_before_it_sets_a_limit_that_would_kill(tmp_path: Path) -> None:
    groups = _v2(tmp_path)
    groups.sweep()
    groups.create("a", LIMITS)
    jail = tmp_path / "roost-x/a"
    smaller = dataclasses.replace(LIMITS, memory_bytes=32 << 20)
    (jail / "memory.current").write_text(str(40 << 20))
    assert not groups.shrink("a", smaller)
    assert (_read(jail / "memory.high"), _read(jail / "memory.max")) == (str(30 << 20), str(64 << 20))
    (jail / "memory.current").write_text(str(30 << 20))
    assert groups.shrink("a", smaller)
    groups.limit("a", smaller)
    assert _read(jail / "memory.max") == str(32 << 20)


def test_v2_is_chosen_where_it_has_the_memory_controller(tmp_path: Path) -> None:
    (tmp_path / "cgroup.controllers").write_text("cpu memory pids\n")
    assert isinstance(cgroups.detect(tmp_path, tmp_path), V2)


def test_v1_is_chosen_in_hybrid_mode(tmp_path: Path) -> None:
    for name in CONTROLLERS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "cgroup.procs").touch()
    assert isinstance(cgroups.detect(tmp_path, tmp_path), V1)


def test_a_machine_without_any_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="memory, cpu, cpuacct, pids, freezer") as refused:
        cgroups.detect(tmp_path, tmp_path)
    assert refused.value.hint


def test_every_data_directory_has_a_parent_of_its_own(tmp_path: Path) -> None:
    names = {cgroups.parent_name(tmp_path / name) for name in "abc"}
    assert len(names) == 3
    assert cgroups.parent_name(tmp_path / "x" / ".." / "a") in names, "the same directory, said otherwise"
