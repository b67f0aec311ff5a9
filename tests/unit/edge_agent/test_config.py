"""edge.toml"""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_agent.app import _capacity
from edge_agent.config import EdgeConfig, PositionConfig, Role
from edge_agent.jail.config import jailer_config
from shared import config

SMALLEST = 'node = "a"\ndata_dir = "/var/lib/roost"\ncoordinators = ["10.0.0.1:7300"]\n'


def _load(text: str) -> EdgeConfig:
    return config.load(EdgeConfig, text, "edge.toml")


def test_the_smallest_one_takes_the_rest_from_the_machine() -> None:
    edge = _load(SMALLEST)
    assert (edge.role, edge.listen, edge.mdns, edge.position) == (Role.EDGE, "127.0.0.1:0", True, None)
    assert edge.capacity.memory > 0
    assert edge.capacity.cpu >= 1
    assert edge.capacity.pids > 0


def test_all_of_it() -> None:
    edge = _load(
        SMALLEST
        + """
        site = "shop-12"
        role = "cloud"
        listen = "0.0.0.0:7400"
        advertise = "shop-12.example.org:7400"
        mdns = false
        [position]
        latitude = 60
        longitude = 10.5
        [capacity]
        memory = "2G"
        [jailer]
        uid_base = 1000000
        daemon_user = "nobody"
        stop_grace = "5s"
        [devices.gpu]
        paths = ["/dev/dri/renderD128", "/dev/dri/card0"]
        count = 2
        [devices.serial]
        paths = ["/dev/serial/by-id/usb-ACME_1-if00"]
        """
    )
    assert edge.position == PositionConfig(60.0, 10.5)
    assert edge.capacity.memory == 2 << 30
    assert edge.capacity.cpu >= 1, "what is not said comes from the machine"
    jailer = jailer_config(edge, Path("/etc/roost/edge.toml"))
    assert (jailer.uid_base, jailer.stop_grace) == (1_000_000, 5.0)
    assert jailer.daemon_uid != 0


def test_coordinators_are_addresses_and_at_least_one() -> None:
    for written in ("[]", '["somewhere"]', '["10.0.0.1:7300", "x"]'):
        with pytest.raises(config.ConfigError, match="coordinators"):
            _load(f'node = "a"\ndata_dir = "/x"\ncoordinators = {written}')
    assert _load('node = "a"\ndata_dir = "/x"\ncoordinators = ["10.0.0.1:7300", "[::1]:7300"]')


def test_the_daemon_is_never_root() -> None:
    with pytest.raises(config.ConfigError, match="daemon_user"):
        jailer_config(_load(SMALLEST + '[jailer]\ndaemon_user = "root"'), Path("/etc/roost/edge.toml"))


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ('role = "fog"', "role"),
        ('listen = "7400"', "host:port"),
        ('listen = "0.0.0.0:7400"', "advertise"),
        ("[position]\nlatitude = 91\nlongitude = 0", "latitude"),
        ("[jailer]\nuid_base = 0", "uid_base"),
        ('[jailer]\nstop_grace = "0s"', "stop_grace"),
        ("[capacity]\npids = 0", "capacity"),
        ("colour = 1", "unknown key"),
    ],
)
def test_what_is_wrong_is_named(text: str, word: str) -> None:
    with pytest.raises(config.ConfigError, match=word):
        _load(SMALLEST + text)


def test_devices_are_named_and_counted() -> None:
    edge = _load(
        SMALLEST
        + '[devices.gpu]\npaths = ["/dev/a", "/dev/b"]\ncount = 2\n[devices.bell]\npaths = ["/dev/c"]\n'
    )
    jailer = jailer_config(edge, Path("/etc/roost/edge.toml"))
    assert jailer.devices == {"gpu": ("/dev/a", "/dev/b"), "bell": ("/dev/c",)}
    assert _capacity(edge).devices == (("bell", 1), ("gpu", 2))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('gpu = "/dev/a"', "devices.gpu: must be a table"),
        ("[devices.gpu]", "devices.gpu: paths is missing"),
        ("[devices.gpu]\npaths = []", "paths is empty"),
        ('[devices.gpu]\npaths = ["/etc/passwd"]', "not below /dev"),
        ('[devices.gpu]\npaths = ["/dev/../etc/passwd"]', "not below /dev"),
        ('[devices.gpu]\npaths = ["/dev/null"]', "of its own"),
        ('[devices.gpu]\npaths = ["/dev/shm/a"]', "of its own"),
        ('[devices.gpu]\npaths = ["/dev/a"]\ncount = 0', "count must be"),
        ('[devices."a b"]\npaths = ["/dev/a"]', "'a b'"),
    ],
)
def test_a_device_that_makes_no_sense_is_refused_by_name(text: str, words: str) -> None:
    with pytest.raises(config.ConfigError, match=words):
        _load(SMALLEST + ("" if text.startswith("[") else "[devices]\n") + text)
