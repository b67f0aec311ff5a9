"""The roots as data: what is shown inside, in which order, and what a refusal says."""

from __future__ import annotations

import dataclasses
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from edge_agent.jail import plan, roots
from edge_agent.jail.config import JailerConfig
from edge_agent.jail.operations import Do, Operation, PlanFailed, Progress, carry_out
from edge_agent.jail.protocol import Limits, Make, Refused

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


def _texts(operations: tuple[Operation, ...]) -> list[str]:
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
        "/srv/roost/roost/_effects.py",
        "/srv/roost/roost/_line.py",
        "/srv/roost/roost/_tasks.py",
        "/srv/roost/roost/_timers.py",
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

    reached: list[Operation] = []
    steps = (
        Do("first", lambda: None),
        Do("build a wall", refuse),
        Do("never", lambda: None),
    )
    with pytest.raises(PlanFailed, match=r"build a wall: Operation not permitted \(EPERM\)") as failed:
        carry_out(steps, reached.append)
    assert "--privileged" in failed.value.hint
    assert reached == list(steps[:2])


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (errno.EACCES, "AppArmor"),
        (errno.ENOSPC, "fs.mount-max"),
        (errno.ENOSYS, "Linux 5.12"),
        (errno.EMFILE, "LimitNOFILE"),
        (errno.ENOMEM, "memory"),
        (errno.EAGAIN, "pid_max"),
        (errno.ELOOP, "symlink"),
        (errno.EXDEV, "the node's log"),
    ],
)
def test_every_refusal_has_a_hint(number: int, told: str) -> None:
    failed = PlanFailed(plan.LoopbackUp(), OSError(number, "why"))
    assert errno.errorcode[number] in failed.message
    assert failed.message.endswith(": why"), "what the caller knows is kept"
    assert told in failed.hint


def test_progress_tells_all_and_the_last_of_whoever_shares_it() -> None:
    jailers = Progress.begin()
    inits = Progress(os.dup(jailers.fd), "init")
    assert jailers.read() == ""
    jailers.note(plan.LoopbackUp())
    inits.note(plan.SealRoot())
    assert jailers.lines() == ["jailer: bring the loopback interface up", "init: make the root read-only"]
    assert jailers.read() == "init: make the root read-only"
    for progress in (jailers, inits):
        progress.close()


def test_those_who_tell_their_progress_at_once_do_not_write_over_each_other() -> None:
    many = 2_000  # as many as fit into what is read
    jailers = Progress.begin()
    writer = (
        "import os, sys\n"
        "from edge_agent.jail.operations import Do, Progress\n"
        "progress = Progress(int(sys.argv[1]), sys.argv[2])\n"
        "print(flush=True); sys.stdin.readline()\n"
        f"for n in range({many}): progress.note(Do(str(n), print))"
    )
    whos = ("init", "builder")
    processes = [
        subprocess.Popen(
            (sys.executable, "-c", writer, str(jailers.fd), who),
            pass_fds=(jailers.fd,),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for who in whos
    ]
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()  # it is there
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(b"go\n")
        process.stdin.flush()
    for process in processes:
        process.communicate(timeout=30)
    assert sorted(jailers.lines()) == sorted(f"{who}: {n}" for who in whos for n in range(many))
    jailers.close()


def test_only_devices_that_the_operator_named_come_into_a_jail() -> None:
    config = dataclasses.replace(CONFIG, devices={"gpu": ("/dev/dri/a", "/dev/dri/b"), "bell": ("/dev/c",)})
    texts = _texts(roots.jail_plan(dataclasses.replace(REQUEST, devices=("gpu",)), SYSTEM, config))
    assert [t for t in texts if "/dev/dri" in t or "/dev/c" in t] == [
        "make /var/lib/roost/root/dev/dri/a, the device /dev/dri/a",
        "make /var/lib/roost/root/dev/dri/b, the device /dev/dri/b",
    ]
    with pytest.raises(Refused, match="no device laser") as refused:
        roots.jail_plan(dataclasses.replace(REQUEST, devices=("laser",)), SYSTEM, config)
    assert "edge.toml" in refused.value.hint


def test_what_is_no_device_is_not_made_one(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    operation = plan.CopyDevice(str(tmp_path / "file"), str(tmp_path / "made"))
    with pytest.raises(PlanFailed, match="ENODEV") as failed:
        carry_out([operation])
    assert "edge.toml" in failed.value.hint
    assert not (tmp_path / "made").exists()
