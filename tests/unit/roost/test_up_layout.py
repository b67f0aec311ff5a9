"""What `roost up` would run, without running it."""

from __future__ import annotations

import itertools
import tomllib
from pathlib import Path
from typing import Any

import pytest

from roost.up.layout import NODES, PORTS, Process, layout
from roost.up.needs import Machine, check
from shared.errors import RoostError

DATA = Path('/data dir/"quoted"')


def planned(machine: str = "x86_64") -> dict[str, Process]:
    ports = range(7000, 7000 + PORTS)
    return {p.name: p for p in layout(DATA, ports, "/venv/python", "/usr/bin/etcd", machine)}


def config(process: Process) -> dict[str, Any]:
    (text,) = process.files.values()
    return tomllib.loads(text)


def test_etcd_then_the_coordinator_then_all_nodes() -> None:
    stages = [(p.stage, p.name) for p in planned().values()]
    assert stages == [(0, "etcd"), (1, "coordinator"), (2, "edge-north"), (2, "edge-south"), (2, "cloud-1")]


def test_each_is_told_where_the_others_are() -> None:
    plan = planned()
    assert plan["etcd"].address == "127.0.0.1:7000"
    assert "--listen-peer-urls=http://127.0.0.1:7001" in plan["etcd"].argv
    coordinator = config(plan["coordinator"])
    assert coordinator["etcd"] == ["127.0.0.1:7000"]
    assert coordinator["listen"] == plan["coordinator"].address == "127.0.0.1:7002"
    for node in NODES:
        assert config(plan[node.name])["coordinators"] == ["127.0.0.1:7002"]
        assert config(plan[node.name])["listen"] == plan[node.name].address


def test_everything_is_on_loopback_and_all_addresses_differ() -> None:
    addresses = [p.address for p in planned().values()]
    assert len(set(addresses)) == len(addresses)
    assert all(address.startswith("127.0.0.1:") for address in addresses)


def test_the_jails_of_two_nodes_never_share_a_uid() -> None:
    bases = sorted(config(planned()[node.name])["jailer"]["uid_base"] for node in NODES)
    assert bases[0] == 2_000_000_000
    assert all(high - low >= 65_536 for low, high in itertools.pairwise(bases))


def test_roles_sites_and_positions() -> None:
    plan = planned()
    assert [(config(plan[n.name])["role"], config(plan[n.name])["site"]) for n in NODES] == [
        ("edge", "north"),
        ("edge", "south"),
        ("cloud", "cloud"),
    ]
    assert config(plan["edge-north"])["position"] == {"latitude": 59.91, "longitude": 10.75}


def test_all_data_and_logs_are_beneath_the_data_directory() -> None:
    for process in planned().values():
        paths = [process.log, *process.directories, *process.files]
        assert all(path.is_relative_to(DATA) for path in paths)
    assert config(planned()["cloud-1"])["data_dir"] == str(DATA / "nodes" / "cloud-1")


def test_etcd_is_told_to_run_on_arm_only_there() -> None:
    assert not planned()["etcd"].env
    assert planned("aarch64")["etcd"].env == {"ETCD_UNSUPPORTED_ARCH": "arm64"}


def test_a_wrong_number_of_ports_is_a_bug_that_shows() -> None:
    with pytest.raises(ValueError):
        layout(DATA, range(PORTS - 1), "python", "etcd", "x86_64")


# --- what it needs -------------------------------------------------------------------------------

FINE = Machine("linux", root=True, etcd="/usr/bin/etcd", absent=())


def test_a_machine_that_has_all_gives_etcd() -> None:
    assert check(FINE) == "/usr/bin/etcd"


@pytest.mark.parametrize(
    ("machine", "complaint", "command"),
    [
        (Machine("darwin", True, None, ()), "needs Linux", "--coordinator"),
        (Machine("linux", False, "/usr/bin/etcd", ()), "needs root", "sudo roost up"),
        (Machine("linux", True, None, ()), "etcd is not installed", "apt-get install --yes etcd-server"),
        (
            Machine("linux", True, "/usr/bin/etcd", ("edge",)),
            "not installed here: edge",
            "pip install 'roost[edge,cli]'",
        ),
    ],
)
def test_what_is_missing_is_named_with_the_command_that_gets_it(
    machine: Machine, complaint: str, command: str
) -> None:
    with pytest.raises(RoostError) as caught:
        check(machine)
    assert complaint in caught.value.message
    assert command in caught.value.hint
