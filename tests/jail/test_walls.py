"""What code in a jail sees and can do: a probe program looks around and reports."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from edge_agent.jail.api import Jail
from tests.support.jailer import FORKED_BUNDLE, RunningJailer, python, spec

# Reports facts, or for an attempt the errno's name or "done".
PROBE = """
import errno, fcntl, json, os, socket, sys
def attempt(f, *args):
    try: f(*args)
    except OSError as e: return errno.errorcode.get(e.errno, str(e))
    return "done"
def read(path):
    with open(path) as f: return f.read()
status = dict(line.split(":\\t", 1) for line in read("/proc/self/status").splitlines())
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def syscall(name, *args):
    if getattr(libc, name)(*args) < 0:
        raise OSError(ctypes.get_errno(), name)
open_fds = []
for fd in range(1024):
    try: fcntl.fcntl(fd, fcntl.F_GETFD)
    except OSError: continue
    open_fds.append(fd)
target = recv().decode()
report = {
    "ids": [os.getresuid(), os.getresgid(), os.getgroups()],
    "caps": {k: status[k].strip() for k in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs")},
    "fds": open_fds,
    "environment": dict(os.environ),
    "interfaces": [name for _, name in socket.if_nameindex()],
    "processes": sorted(int(n) for n in os.listdir("/proc") if n.isdecimal()),
    "me": os.getpid(),
    "root": sorted(os.listdir("/")),
    "cwd": os.getcwd(),
    "host": socket.gethostname(),
    "cgroup": read("/proc/self/cgroup"),
    "bundle": os.listdir("/agent"),
    "sdk": sorted(os.listdir("/roost/roost")),
    "devices": sorted(os.listdir("/dev")),
    "writes": {
        path: attempt(lambda: open(path, "w").close())
        for path in ("/usr/x", "/agent/x", "/x", "/etc/x", "/etc/passwd", "/dev/x", "/roost/roost/x",
                     "/proc/sys/kernel/hostname", "/proc/sys/kernel/core_pattern", "/run/x",
                     "/state/x", "/tmp/x", "/dev/shm/x", "/dev/null")
    },
    "reads": {
        path: attempt(lambda: os.listdir(path)) for path in (target, "/proc/1", "/sys", "/var", "/boot")
    },
    "attempts": {
        "setuid 0": attempt(os.setuid, 0),
        "kill init": attempt(os.kill, 1, 9),
        "mount": attempt(syscall, "mount", b"none", b"/tmp", b"tmpfs", 0, None),
        "unmount": attempt(syscall, "umount2", b"/proc/sys", 2),
        "chroot": attempt(os.chroot, "/tmp"),
        "unshare user": attempt(syscall, "unshare", 0x10000000),
        "unshare mounts": attempt(syscall, "unshare", 0x00020000),
        "enter init's namespace": attempt(lambda: os.open("/proc/1/ns/mnt", os.O_RDONLY)),
        "raw socket": attempt(lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1).close()),
        "connect out": attempt(lambda: socket.create_connection(("192.0.2.1", 80), 1).close()),
        "loopback": attempt(lambda: socket.create_server(("127.0.0.1", 0)).close()),
        "mknod": attempt(lambda: os.mknod("/tmp/disk", 0o60666, os.makedev(8, 0))),
        "hostname": attempt(socket.sethostname, "x"),
        "ptrace init": attempt(syscall, "ptrace", 16, 1, None, None),
    },
    "mounts": [line.split(" ")[4:6] for line in read("/proc/self/mountinfo").splitlines()],
}
send(json.dumps(report).encode())
while True: recv()
"""


@pytest.fixture(params=["exec", "zygote"])
def way(request: pytest.FixtureRequest) -> str:
    """The walls are the same for each way of starting."""
    return str(request.param)


async def _probe(jailer: RunningJailer, way: str, target: str) -> tuple[Jail, dict[str, Any]]:
    jail = await jailer.started(way, "probe", PROBE, TOKEN="given")
    async with asyncio.timeout(10.0):
        await jail.send(target.encode())
        return jail, json.loads(await jail.receive())


async def test_the_walls_of_a_jail(jailer: RunningJailer, way: str) -> None:
    neighbour = await jailer.jails.make(spec("neighbour", python("while True: recv()")))
    await neighbour.start()
    _, seen = await _probe(jailer, way, f"{jailer.data_dir}/jails/neighbour/state")

    assert seen["ids"] == [[1000] * 3, [1000] * 3, []]
    none = "0" * 16
    assert seen["caps"] == {
        "CapInh": none,
        "CapPrm": none,
        "CapEff": none,
        "CapBnd": none,
        "CapAmb": none,
        "NoNewPrivs": "1",
    }
    assert seen["fds"] == [0, 1, 2, 3]
    assert seen["environment"] == {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": "/state",
        "TMPDIR": "/tmp",
        "LANG": "C.UTF-8",
        "ROOST_FD": "3",
        "TOKEN": "given",
    }
    assert seen["interfaces"] == ["lo"]
    assert seen["processes"] == [seen["me"]], "neither init nor anybody else's"
    ours = {"agent", "roost", "state", "tmp", "proc", "dev", "etc", "run"}
    system = {"usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32", Path(sys.base_prefix).parts[1]}
    assert ours <= set(seen["root"]) <= ours | system
    assert (seen["cwd"], seen["host"]) == ("/agent", "probe")
    assert set(seen["bundle"]) == ({"hello.txt"} if way == "exec" else FORKED_BUNDLE)
    assert seen["sdk"] == ["__init__.py", "_effects.py", "_line.py", "_tasks.py", "_timers.py", "agent.py"]
    assert set(seen["devices"]) == {
        *("null", "zero", "full", "random", "urandom", "shm"),
        *("fd", "stdin", "stdout", "stderr"),
    }
    assert {line.split(":")[2] for line in seen["cgroup"].splitlines()} <= {"/", "/agent"}


async def test_what_a_jail_may_not_do(jailer: RunningJailer, way: str) -> None:
    neighbour = await jailer.jails.make(spec("neighbour", python("while True: recv()")))
    await neighbour.start()
    _, seen = await _probe(jailer, way, f"{jailer.data_dir}/jails/neighbour/state")

    allowed = {"/state/x", "/tmp/x", "/dev/shm/x", "/dev/null"}
    assert {path for path, result in seen["writes"].items() if result == "done"} == allowed
    assert "done" not in seen["reads"].values()
    done = {what for what, result in seen["attempts"].items() if result == "done"}
    assert done == {"loopback"}, seen["attempts"]
    writable = {point for point, options in seen["mounts"] if "rw" in options.split(",")}
    assert writable == {"/dev/shm", "/tmp", "/proc", "/state"}
    assert all("nosuid" in options for _, options in seen["mounts"])


async def test_a_jail_has_uids_of_its_own_and_keeps_them(jailer: RunningJailer) -> None:
    first = await jailer.jails.make(spec("first", python("while True: recv()")))
    second = await jailer.jails.make(spec("second", python("while True: recv()")))
    owners = {name: _state_of(jailer, name).stat().st_uid for name in ("first", "second")}
    assert owners["first"] != owners["second"]
    uids = {_uid(pid) for pid in jailer.inits()}
    assert len(uids) == 2
    assert not uids & {0, *owners.values()}
    await first.kill()
    await jailer.jails.discard("first")
    third = await jailer.jails.make(spec("third", python("while True: recv()")))
    assert _state_of(jailer, "third").stat().st_uid == owners["first"], "the lowest free slot"
    await second.kill()
    await jailer.jails.make(spec("second", python("while True: recv()")))
    assert _state_of(jailer, "second").stat().st_uid == owners["second"]
    assert _state_of(jailer, "second").stat().st_mode & 0o777 == 0o700
    await third.kill()


async def test_tmp_is_private_and_gone_with_the_jail(jailer: RunningJailer) -> None:
    look = "import os; recv(); send(repr(os.listdir('/tmp')).encode()); open('/tmp/mine', 'w')"
    code = look + "\nwhile True: recv()"
    for jail_id in ("a", "b", "a"):
        jail = await jailer.jails.make(spec(jail_id, python(code)))
        await jail.start()
        await jail.send(b"look")
        assert await jail.receive() == b"[]"
        if jail_id == "a":
            await jail.kill()


async def test_a_link_in_the_state_leads_nowhere(jailer: RunningJailer, way: str) -> None:
    """What an agent links to is never opened: neither for the node nor when the directory is removed."""
    outside = jailer.data_dir / "outside"
    outside.write_text("secret")
    code = f"""
import os
for name, to in (("link", {str(outside)!r}), ("all", "/"), ("up", "../../.."), ("self", "/proc/self/root")):
    os.symlink(to, "/state/" + name)
os.mkfifo("/state/fifo")
socket.socket(socket.AF_UNIX).bind("/state/socket")
send(b".")
while True: recv()
"""
    jail = await jailer.started(way, "a", code)
    await jail.receive()
    for path in ("link", "all/etc/passwd", "all", "up/etc/passwd", "self/etc/passwd", "fifo", "socket"):
        with pytest.raises(FileNotFoundError):
            os.close(await jail.files.open_read(path))
    with pytest.raises(ValueError, match="no path within"):
        await jail.files.open_read("../../outside")
    assert [entry.path for entry in await jail.files.scan()] == ["all", "link", "self", "up"]
    await jail.kill()
    await jailer.jails.discard("a")
    assert outside.read_text() == "secret"


async def test_the_daemon_has_no_power_and_sees_only_its_own(jailer: RunningJailer) -> None:
    pid = jailer.daemon_pid
    status = dict(line.split(":\t", 1) for line in _proc_lines(pid, "status") if ":\t" in line)
    assert "0" not in status["Uid"].split()
    assert status["Groups"].strip() == ""
    assert {int(status[k], 16) for k in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
    assert status["NoNewPrivs"].strip() == "1"
    mounts = [line.split(" ") for line in _proc_lines(pid, "mountinfo")]
    writable = {fields[4] for fields in mounts if "rw" in fields[5].split(",")}
    data = str(jailer.data_dir)
    proc = {path for path in writable if path.startswith("/proc")}
    assert writable - proc == {"/dev/shm", "/tmp", f"{data}/daemon", f"{data}/bundles"}
    root = Path(f"/proc/{pid}/root")
    assert sorted(os.listdir(f"{root}{data}")) == ["bundles", "daemon"]


def _state_of(jailer: RunningJailer, jail_id: str) -> Path:
    return jailer.data_dir / "jails" / jail_id / "state"


def _uid(pid: int) -> int:
    for line in _proc_lines(pid, "status"):
        if line.startswith("Uid:"):
            return int(line.split()[1])
    raise AssertionError(f"no uid of {pid}")


def _proc_lines(pid: int, name: str) -> list[str]:
    return Path(f"/proc/{pid}/{name}").read_text().splitlines()
