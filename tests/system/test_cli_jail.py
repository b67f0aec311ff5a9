"""`roost jail plan`: of a directory and of what is deployed, without root and without a node."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.system.test_cli import HELLO, Cli, cli

__all__ = ["cli"]


def _operations(told: dict[str, Any], who: str) -> list[str]:
    return [o for stage in told["stages"] if stage["who"] == who for o in stage["operations"]]


async def test_of_a_directory_it_is_numbered_and_grouped_by_who_does_it(cli: Cli) -> None:
    done = await cli.run("jail", "plan", str(HELLO), there=False)
    assert (done.code, done.err) == (0, "")
    head, *lines = [line for line in done.out.splitlines() if line]
    assert head.startswith("A jail of hello, started by exec")
    groups = [line.strip() for line in lines if not line.split()[0].isdigit()]
    assert groups == ["the instance", "jailer", "init", "jailer", "init", "agent's process"]
    numbers = [int(line.split()[0]) for line in lines if line.split()[0].isdigit()]
    assert numbers == list(range(1, len(numbers) + 1))
    assert "64M memory, 0.25 cores, 16 pids" in done.out, "as its agent.toml says"


async def test_of_a_deployed_agent_with_packages(cli: Cli, tmp_path: Path) -> None:
    directory = tmp_path / "hello"
    shutil.copytree(HELLO, directory)
    (directory / "site-packages").mkdir()
    (directory / "site-packages/lib.py").touch()
    assert (await cli.run("deploy", str(directory))).code == 0
    done = await cli.run("jail", "plan", "hello", "--way", "zygote", "--json")
    assert done.code == 0, done.err
    told = done.json
    assert (told["agent"], told["way"]) == ("hello", "zygote")
    assert {stage["jail"] for stage in told["stages"]} == {"zygote", "instance"}
    for who in ("zygote", "mounter"):
        assert [o for o in _operations(told, who) if o.endswith("/packages")], who
    assert [stage["who"] for stage in told["stages"]] == [
        *("jailer", "zygote"),
        *("jailer", "builder", "jailer", "init", "zygote's child", "mounter"),
        *("jailer", "mounter", "init", "jailer", "agent's process"),
    ]


async def test_what_can_not_be_planned_is_said(cli: Cli, tmp_path: Path) -> None:
    done = await cli.run("jail", "plan", "nobody")
    assert (done.code, "no agent nobody" in done.err) == (1, True)
    done = await cli.run("jail", "plan", f"{tmp_path}/", "--json")
    assert done.json["error"]["reason"] == "AGENT_INVALID"
    directory = tmp_path / "hello"
    shutil.copytree(HELLO, directory)
    with (directory / "agent.toml").open("a") as file:
        file.write('devices = ["laser"]\n')
    done = await cli.run("jail", "plan", str(directory), there=False)
    assert (done.code, "no device laser" in done.err, "edge.toml" in done.err) == (1, True, True)


async def test_it_follows_the_nodes_configuration(cli: Cli, tmp_path: Path) -> None:
    config = tmp_path / "edge.toml"
    config.write_text('node = "a"\ndata_dir = "/srv/roost"\ncoordinators = ["127.0.0.1:1"]\n')
    told = (await cli.run("jail", "plan", str(HELLO), "--config", str(config), "--json")).json
    assert "make /srv/roost/root the root" in _operations(told, "init")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become nobody")
def test_it_needs_no_root(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "roost.cli.main", "jail", "plan", str(HELLO)],
        user=65534,
        group=65534,
        extra_groups=[],
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_where_the_edge_part_is_missing_it_says_how_to_get_it(tmp_path: Path) -> None:
    code = "import sys; sys.modules['cgroupspy'] = None; from roost.cli.main import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, "jail", "plan", str(HELLO)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "pip install 'roost[edge,cli]'" in done.stderr
