"""The unit, its example configuration, and the script that installs both."""

import configparser
import os
import subprocess
import sys
from pathlib import Path

import pytest

from edge_agent.config import EdgeConfig
from shared import config
from shared.units import parse_duration
from tests.packaging.examples import missing_keys, uncommented

ROOT = Path(__file__).parents[2]
SYSTEMD = ROOT / "packaging" / "systemd"
UNIT = "roost-edge.service"
EXAMPLE = (SYSTEMD / "edge.toml.example").read_text().replace("@NODE@", "box-1")

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="install.sh makes a system user: needs root")


def unit() -> configparser.SectionProxy:
    parser = configparser.RawConfigParser(strict=False)
    parser.optionxform = str
    parser.read(SYSTEMD / UNIT)
    return parser["Service"]


def install(*arguments: str) -> str:
    done = subprocess.run(
        [SYSTEMD / "install.sh", *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def files(root: Path) -> set[str]:
    return {str(p.relative_to(root)) for p in root.rglob("*") if not p.is_dir() or p.is_symlink()}


def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    # Verification insists on a program that exists: this Python stands for the installed one.
    text = (SYSTEMD / UNIT).read_text().replace("/opt/roost/bin/roost-edge", sys.executable)
    (tmp_path / UNIT).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", tmp_path / UNIT],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_unit_waits_longer_than_the_node_needs_to_stop() -> None:
    node = config.load(EdgeConfig, EXAMPLE, "edge.toml.example")
    assert parse_duration(unit()["TimeoutStopSec"]) > node.jailer.stop_grace


def test_the_example_loads_as_it_is() -> None:
    node = config.load(EdgeConfig, EXAMPLE, "edge.toml.example")
    assert (node.node, node.data_dir) == ("box-1", Path("/var/lib") / unit()["StateDirectory"])


def test_the_example_shows_every_key_and_the_true_defaults() -> None:
    shown = config.load(EdgeConfig, uncommented(EXAMPLE), "edge.toml.example")
    bare = EdgeConfig(node="box-1", data_dir=shown.data_dir, coordinators=shown.coordinators)
    assert (shown.site, shown.role, shown.mdns, shown.jailer) == (
        bare.site,
        bare.role,
        bare.mdns,
        bare.jailer,
    )
    assert missing_keys(EXAMPLE, shown, shown.position, shown.capacity, shown.jailer) == []


@needs_root
@pytest.mark.timeout(300)
def test_installing_twice_and_uninstalling_leaves_only_configuration_and_state(tmp_path: Path) -> None:
    root = ["--root", str(tmp_path), "--prefix", "/opt/mesh"]
    assert "wrote" in install(*root)
    program = (tmp_path / "opt/mesh/bin/roost-edge").read_text()
    assert program.startswith("#!/opt/mesh/bin/python\n")
    assert "ExecStart=/opt/mesh/bin/roost-edge" in (tmp_path / "etc/systemd/system" / UNIT).read_text()
    assert (tmp_path / "etc/systemd/system/multi-user.target.wants" / UNIT).is_symlink()
    assert (tmp_path / "etc/passwd").read_text().startswith("roost:")
    before = files(tmp_path)

    edited = tmp_path / "etc/roost/edge.toml"
    edited.write_text('node = "mine"\n')
    (tmp_path / "var/lib/roost/state").write_text("kept")
    assert "keeping" in install(*root)
    assert edited.read_text() == 'node = "mine"\n'
    assert files(tmp_path) == before | {"var/lib/roost/state"}

    install("--uninstall", *root)
    install("--uninstall", *root)
    users = {f"etc/{name}" for name in ("passwd", "shadow", "group", "gshadow", ".pwd.lock")}
    assert files(tmp_path) - users == {"etc/roost/edge.toml", "var/lib/roost/state"}


@pytest.mark.parametrize("prefix", ["/", "/usr", "/opt", "/home/"])
def test_a_prefix_that_holds_other_things_is_refused(tmp_path: Path, prefix: str) -> None:
    done = subprocess.run(
        [SYSTEMD / "install.sh", "--uninstall", "--root", tmp_path, "--prefix", prefix],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode != 0
    assert "holds other things" in done.stderr
