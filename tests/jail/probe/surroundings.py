"""Hazards around it: networks, descriptors, programs, privileges, other processes, and taking too much."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import resource
import signal
import socket
import struct
import sys
from collections.abc import Callable

from .attempts import (
    HAZARDS,
    Argument,
    first,
    hazard,
    planted,
    read,
    status_lines,
    syscall,
    writes,
)

# --- sockets --------------------------------------------------------------------------------------


def _socket(hazard_name: str, family: int, kind: int, protocol: int = 0) -> None:
    def attempt() -> str | None:
        socket.socket(family, kind, protocol).close()
        return "opened"

    HAZARDS[hazard_name] = attempt


_socket("raw socket", socket.AF_INET, socket.SOCK_RAW, 1)
_socket("packet socket", 17, socket.SOCK_RAW, 0x300)
_socket("netlink: netfilter", 16, socket.SOCK_RAW, 12)
_socket("netlink: audit", 16, socket.SOCK_RAW, 9)
_socket("netlink: uevents", 16, socket.SOCK_RAW, 15)
_socket("vsock, to the hypervisor", 40, socket.SOCK_STREAM)
_socket("kernel crypto (AF_ALG)", 38, socket.SOCK_SEQPACKET)
_socket("rare protocols (SCTP)", socket.AF_INET, socket.SOCK_STREAM, 132)
_socket("rare families (key, TIPC)", 30, socket.SOCK_SEQPACKET)


@hazard("change the network by netlink")
def _netlink_write() -> str | None:
    """RTM_NEWLINK of a dummy device."""
    with socket.socket(16, socket.SOCK_RAW, 0) as s:
        attribute = struct.pack("=HH5s3x", 9, 5 + 4, b"dummy")
        info = struct.pack("=HH", 4 + len(attribute), 18) + struct.pack("=HH5s3x", 9, 1, b"dummy")
        body = struct.pack("=BxHiII", 0, 0, 0, 0, 0) + info
        s.send(struct.pack("=IHHII", 16 + len(body), 16, 0x605, 1, 0) + body)
        answer = s.recv(4096)
    code: int = struct.unpack_from("=i", answer, 16)[0]
    if code:
        raise OSError(-code, os.strerror(-code))
    return "done"


@hazard("abstract unix socket of the host")
def _abstract() -> str | None:
    with socket.socket(socket.AF_UNIX) as s:
        s.connect("\0" + planted("ABSTRACT"))
    return "connected"


@hazard("container engine's socket")
def _engine() -> str | None:
    def connect(path: str) -> None:
        with socket.socket(socket.AF_UNIX) as s:
            s.connect(path)

    names = (
        *("docker.sock", "containerd/containerd.sock", "podman/podman.sock", "crio/crio.sock"),
        *("dbus/system_bus_socket", "systemd/private", "snapd.socket"),
    )
    host = (planted("SOCKET"),) if planted("SOCKET") else ()
    return first([f"{d}/{n}" for d in ("/run", "/var/run") for n in names] + list(host), connect)


@hazard("connect to a port of the host")
def _host_port() -> str | None:
    socket.create_connection(("127.0.0.1", int(planted("PORT") or 1)), 2).close()
    return "connected"


@hazard("a way out: TCP or UDP to another machine")
def _egress() -> str | None:
    """A UDP socket's connect looks for a route and sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.connect(("192.0.2.1", 80))
    return "there is a route"


@hazard("a way out: IPv6")
def _egress6() -> str | None:
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as s:
        s.connect(("2001:db8::1", 80))
    return "there is a route"


@hazard("a way out: DNS")
def _dns() -> str | None:
    servers = [line.split()[1] for line in _resolv_conf() if line.startswith("nameserver ")]

    def connect(address: str) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as s:
            s.connect((address, 53))

    return first([s for s in servers if not s.startswith("127.")] or ["192.0.2.53"], connect)


def _resolv_conf() -> list[str]:
    try:
        return read("/etc/resolv.conf").decode().splitlines()
    except OSError:
        return []


@hazard("a way out: the cloud's metadata service")
def _metadata() -> str | None:
    def connect(address: str) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as s:
            s.connect((address, 80))

    return first(("169.254.169.254", "169.254.170.2", "100.100.100.200", "fd00:ec2::254"), connect)


@hazard("other interfaces than loopback")
def _interfaces() -> str | None:
    others = [name for _, name in socket.if_nameindex() if name != "lo"]
    return others[0] if others else None


# --- descriptors, programs, privileges ------------------------------------------------------------


@hazard("a descriptor that leaked in")
def _leaked() -> str | None:
    """Anything open but 0 to 2, the turn socket and what the probe has opened itself."""
    mine = {0, 1, 2, *map(int, filter(None, (os.environ.get("ROOST_FD"), planted("OWN_FD"))))}
    for fd in range(3, 4096):
        with contextlib.suppress(OSError):
            fcntl.fcntl(fd, fcntl.F_GETFD)
            if fd not in mine:
                return f"{fd}: {os.readlink(f'/proc/self/fd/{fd}')}"
    return None


@hazard("a working directory outside (runc 2024-21626)")
def _working_directory() -> str | None:
    where = os.readlink("/proc/self/cwd")
    if "unreachable" in where or not os.path.samefile(os.path.realpath("../" * 40), "/"):
        return where
    for fd in range(3, 64):
        try:
            os.stat(f"/proc/self/fd/{fd}/../../../../../etc/shadow")
        except OSError:
            continue
        return f"/proc/self/fd/{fd}"
    return None


writes("overwrite its own program (runc 2019-5736)", "/proc/self/exe", sys.executable)
writes("overwrite process 1's program", "/proc/1/exe")
writes("overwrite a program or library of the host", "/usr/bin/env", "/bin/sh", "/etc/ld.so.cache")


@hazard("put a file beside the host's programs")
def _plant() -> str | None:
    def plant(directory: str) -> None:
        path = f"{directory}/probe-{os.getpid()}"
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        os.unlink(path)

    return first(("/usr/bin", "/usr/local/bin", "/etc", "/lib", "/opt", "/root", "/var/lib"), plant)


@hazard("replace what masks and devices are made of (runc 2025-31133)")
def _mask_sources() -> str | None:
    """Whoever may write to one of these directories can put a link where a later jail is masked from. A file
    without a name does no harm."""

    def make(directory: str) -> None:
        os.close(os.open(directory, os.O_TMPFILE | os.O_WRONLY, 0o600))

    return first(("/dev", "/run/empty", "/run/empty/directory", "/run", "/"), make)


writes(
    "redirect the runtime's writes to /proc (runc 2025-52881)",
    *("/proc/1/attr/current", "/proc/1/oom_score_adj", "/proc/1/uid_map", "/proc/sys/kernel/ns_last_pid"),
)


@hazard("capabilities, in any set")
def _capabilities() -> str | None:
    status = status_lines()
    for name in ("CapEff", "CapPrm", "CapInh", "CapAmb", "CapBnd"):
        if int(status[name], 16):
            return f"{name} {status[name].strip()}"
    return None


@hazard("run as the host's root")
def _root_outside() -> str | None:
    inside, outside, _ = read("/proc/self/uid_map").split()[:3]
    return "uid 0" if os.getuid() == int(inside) == int(outside) == 0 else None


@hazard("no no_new_privs")
def _new_privileges() -> str | None:
    return None if status_lines()["NoNewPrivs"].strip() == "1" else "not set"


@hazard("no system call filter")
def _no_filter() -> str | None:
    return None if status_lines()["Seccomp"].strip() == "2" else "none"


@hazard("become root")
def _setuid() -> str | None:
    if os.getuid() == 0:
        return "is it already"
    os.setresuid(0, 0, 0)
    return "done"


@hazard("set-uid programs gain root")
def _suid() -> str | None:
    """A mount that honours the bit, in a process that does: both are needed."""
    if status_lines()["NoNewPrivs"].strip() == "1":
        return None
    lines = [line.split(" ") for line in read("/proc/self/mountinfo").decode().splitlines()]
    honouring = [fields[4] for fields in lines if "nosuid" not in fields[5].split(",")]
    return honouring[0] if honouring else None


@hazard("feed the host's core dump program")
def _core() -> str | None:
    """Only a limit of 1 byte stops a pipe; and it has to stay."""
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    soft, _ = resource.getrlimit(resource.RLIMIT_CORE)
    return None if soft == 1 else f"limit {soft}"


@hazard("secrets in the environment")
def _secrets() -> str | None:
    return "HOST_SECRET" if "HOST_SECRET" in os.environ else None


# --- others ---------------------------------------------------------------------------------------


@hazard("kill process 1")
def _kill_init() -> str | None:
    """Signal 0: nothing is sent. Where the program itself is process 1, there is no other to protect."""
    if os.getppid() == 1:
        return None
    os.kill(1, 0)
    return "may"


@hazard("signal a process of the host")
def _kill_host() -> str | None:
    pid = int(planted("PID") or 0) or 1 << 21
    os.kill(pid, 0)
    name = read(f"/proc/{pid}/comm").strip().decode()
    return f"may, to {name}"


@hazard("see processes of others")
def _see() -> str | None:
    mine = {os.getpid(), os.getppid(), os.getpgrp(), 1}
    others = [n for n in os.listdir("/proc") if n.isdecimal() and int(n) not in mine]
    strangers = [n for n in others if _uid(n) not in (None, os.getuid())]
    return f"{len(strangers)}" if strangers else None


def _uid(pid: str) -> int | None:
    try:
        return os.stat(f"/proc/{pid}").st_uid
    except OSError:
        return None


@hazard("read a process of the host")
def _read_host() -> str | None:
    pid = planted("PID") or "0"
    data = read(f"/proc/{pid}/environ") or read(f"/proc/{pid}/maps")
    return "read" if b"PROBE_CANARY" in data else None


@hazard("read a file of the host or of another instance")
def _read_neighbour() -> str | None:
    paths = [p for name in ("NEIGHBOUR", "FILE") if (p := planted(name))]
    return first(paths, read)


@hazard("memory of another instance")
def _neighbours_memory() -> str | None:
    """By its pid, as the host has it."""
    pid = int(planted("NEIGHBOUR_PID") or planted("PID") or 0) or 1 << 21

    def look(path: str) -> None:
        if not read(path, 64):
            raise OSError(errno.ENODATA, "empty")

    def call(name: str, *arguments: Argument) -> None:
        syscall(name, *arguments)

    vector = ctypes.create_string_buffer(struct.pack("=QQ", 0, 8))
    ways: dict[str, Callable[[str], None]] = {
        f"/proc/{pid}/maps": look,
        f"/proc/{pid}/environ": look,
        "process_vm_readv": lambda name: call(name, pid, vector, 1, vector, 1, 0),
        "ptrace": lambda name: call(name, 16, pid, None, None),  # PTRACE_ATTACH
    }
    return first(tuple(ways), lambda way: ways[way](way))


@hazard("signal another instance")
def _signal_neighbour() -> str | None:
    """Signal 0: nothing is sent."""
    os.kill(int(planted("NEIGHBOUR_PID") or planted("PID") or 0) or 1 << 21, 0)
    return "may"


@hazard("files in the host's /dev/shm or /tmp")
def _shared_files() -> str | None:
    names = [path for path in planted("SHARED").split(":") if path]
    return first(names, read) if names else None


@hazard("shared memory of the host")
def _shared_memory() -> str | None:
    syscall("shmget", int(planted("SHM") or 0x7FFF0001), 0, 0)
    return "attached"


@hazard("memory that another process can write to")
def _mappings() -> str | None:
    """Mapped as shared and writable: what a zygote's import left so would be every user's."""
    with open("/proc/self/smaps", errors="replace") as file:
        shared = [line for line in file if line.startswith("VmFlags:") and "sh" in line.split()]
    return f"{len(shared)} mappings" if shared else None


@hazard("real-time priority")
def _realtime() -> str | None:
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    return "done"


@hazard("higher priority than others")
def _nice() -> str | None:
    os.setpriority(os.PRIO_PROCESS, 0, -5)
    return "done"


# --- taking too much: each stops well above the limit that it was started with --------------------

_MEMORY, _PROCESSES, _FILES = 128 << 20, 32, 1024


@hazard("fork bomb")
def _forks() -> str | None:
    """Four times the limit."""
    children = []
    try:
        for _ in range(4 * _PROCESSES):
            child = os.fork()
            if child == 0:
                signal.pause()
            children.append(child)
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
        for child in children:
            os.waitpid(child, 0)
    return f"{len(children)} processes"


@hazard("memory bomb")
def _memory() -> str | None:
    """Twice the limit, in a child, which is what should be killed."""
    taken = mmap.mmap(-1, 2 * _MEMORY)
    for at in range(0, len(taken), mmap.PAGESIZE):
        taken[at] = 1
    return f"{len(taken) >> 20} MiB"


@hazard("fill /tmp")
def _fill_tmp() -> str | None:
    return _fill(f"{os.environ.get('TMPDIR', '/tmp')}/probe-{os.getpid()}", 2 * _MEMORY)


@hazard("fill /dev/shm")
def _fill_shm() -> str | None:
    return _fill(f"/dev/shm/probe-{os.getpid()}", 2 * _MEMORY)


@hazard("one file of any size")
def _big_file() -> str | None:
    """A sparse one, over 4 GiB, where the state is: the most that any jail may have there."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    path = f"{planted('STATE') or '/state'}/probe-{os.getpid()}"
    try:
        with open(path, "wb") as file:
            file.truncate((4 << 30) + 1)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path)
    return "4 GiB"


def _fill(path: str, size: int) -> str:
    try:
        with open(path, "wb", buffering=0) as file:
            for _ in range(size >> 20):
                file.write(bytes(1 << 20))
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path)
    return f"{size >> 20} MiB"


@hazard("descriptors without end")
def _descriptors() -> str | None:
    """Four times the limit, and no raising of it."""
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (4 * _FILES, 4 * _FILES))
    opened = []
    try:
        for _ in range(4 * _FILES - 64):
            opened.append(os.open("/dev/null", os.O_RDONLY))
    finally:
        for fd in opened:
            os.close(fd)
    return f"{len(opened)} open"
