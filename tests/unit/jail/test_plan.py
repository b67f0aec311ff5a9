"""The roots as data: what is shown inside, in which order, and what a refusal says."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from edge_agent.jail import plan, roots
from edge_agent.jail.config import JailerConfig
from edge_agent.jail.protocol import Limits, Make

SYSTEM = roots.System(
    directories=("/usr",),
    links=(("/bin", "usr/bin"), ("/lib", "usr/lib")),
    of_etc=("/etc/ssl/certs",),
    localtime="/usr/share/zoneinfo/UTC",
    resolver="/run/systemd/resolve",
    prefix="/srv/roost/.venv",
    base_prefix="/home/dev/python/3.13",
    sources="/srv/roost",
)
CONFIG = JailerConfig(Path("/etc/roost/edge.toml"), Path("/var/lib/roost"))
REQUEST = Make("a-1", "v1", ("/bin/true",), (), Limits(64 << 20, 1000, 8))


def _texts(operations: tuple[plan.Operation, ...]) -> list[str]:
    return [operation.describe() for operation in operations]


def test_a_jail_can_be_printed() -> None:
    texts = _texts(roots.jail_plan(REQUEST, SYSTEM, CONFIG))
    new = "/var/lib/roost/root"
    assert texts[:2] == ["make all mounts private", f"mount a tmpfs of 1024 KiB at {new}"]
    assert texts[-4:] == [
        f"make {new} the root",
        "make the root read-only",
        "bring the loopback interface up",
        "set the host name to a-1",
    ]
    assert f"bind a-1/state of /var/lib/roost/jails read-write at {new}/state" in texts
    assert f"bind v1 of /var/lib/roost/bundles read-only at {new}/agent" in texts
    assert f"bind /home/dev/python/3.13 read-only at {new}/home/dev/python/3.13" in texts


def test_a_jail_has_nothing_writable_but_its_state() -> None:
    operations = roots.jail_plan(REQUEST, SYSTEM, CONFIG)
    writable = [
        o.target for o in operations if isinstance(o, plan.Bind | plan.BindBeneath) and not o.read_only
    ]
    assert writable == ["/var/lib/roost/root/state"]


def test_a_jail_shows_no_virtual_environment_and_no_source_but_the_sdk() -> None:
    sources = [o.source for o in roots.jail_plan(REQUEST, SYSTEM, CONFIG) if isinstance(o, plan.Bind)]
    assert [s for s in sources if s.startswith("/srv/roost")] == [
        "/srv/roost/roost/__init__.py",
        "/srv/roost/roost/agent.py",
    ]
    assert "/etc" not in sources


def test_the_daemon_writes_to_its_own_data_alone() -> None:
    operations = roots.daemon_plan(SYSTEM, CONFIG, "node = 'a'", "/run/systemd/notify")
    writable = [o.source for o in operations if isinstance(o, plan.Bind) and not o.read_only]
    assert writable == ["/var/lib/roost/daemon", "/var/lib/roost/bundles"]
    sources = [o.source for o in operations if isinstance(o, plan.Bind)]
    assert {"/srv/roost", "/home/dev/python/3.13", "/run/systemd/resolve", "/run/systemd/notify"} <= {
        *sources
    }
    assert "/srv/roost/.venv" not in sources, "it comes with /srv/roost"


def test_a_refusal_names_the_operation_and_says_what_to_do() -> None:
    def refuse() -> None:
        raise OSError(errno.EPERM, "no")

    reached: list[int] = []
    steps = (plan.Do("first", lambda: None), plan.Do("build a wall", refuse), plan.Do("never", lambda: None))
    with pytest.raises(plan.PlanFailed, match=r"build a wall: Operation not permitted \(EPERM\)") as failed:
        plan.carry_out(steps, reached.append)
    assert "--privileged" in failed.value.hint
    assert reached == [0, 1]
