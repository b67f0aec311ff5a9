"""Control groups on a tree of plain files: what is written where, and which kind is chosen."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edge_agent.jail import cgroups
from edge_agent.jail.cgroups.v1 import CONTROLLERS, V1
from edge_agent.jail.cgroups.v2 import V2
from edge_agent.jail.protocol import Limits, Refused

LIMITS = Limits(memory_bytes=64 << 20, cpu_millis=1500, pids=10)


def _read(path: Path) -> str:
    return path.read_text().strip()


def _v2(tmp_path: Path, supervised: bool = False) -> V2:
    (tmp_path / "cgroup.subtree_control").touch()
    return V2(tmp_path, "roost-x", supervised)


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
    groups.freeze("a")
    assert _read(agent / "cgroup.freeze") == "1"
    (agent / "cgroup.events").write_text("populated 1\nfrozen 0\n")
    assert not groups.frozen("a")
    (agent / "cgroup.events").write_text("populated 1\nfrozen 1\n")
    assert groups.frozen("a")
    groups.thaw("a")
    assert _read(agent / "cgroup.freeze") == "0"
    assert not (tmp_path / "roost-x/a/cgroup.freeze").exists()


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
    for name in CONTROLLERS:
        (tmp_path / name).mkdir()
    groups = V1(tmp_path, "roost-x")
    groups.sweep()
    groups.create("a", LIMITS)
    assert _read(tmp_path / "memory/roost-x/a/memory.limit_in_bytes") == str(64 << 20)
    assert _read(tmp_path / "memory/roost-x/a/memory.memsw.limit_in_bytes") == str(64 << 20)
    assert _read(tmp_path / "cpu/roost-x/a/cpu.cfs_quota_us") == "150000"
    assert _read(tmp_path / "cpu/roost-x/a/cpu.shares") == "1536"
    assert _read(tmp_path / "pids/roost-x/a/pids.max") == "11"
    assert (tmp_path / "freezer/roost-x/a/agent").is_dir()
    groups.freeze("a")
    assert _read(tmp_path / "freezer/roost-x/a/agent/freezer.state") == "FROZEN"


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
