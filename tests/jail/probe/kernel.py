"""Hazards at the kernel's interface: namespaces, mounts, /proc and /sys, devices, rare system calls."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import signal
import struct
import time
from pathlib import Path

from .attempts import (
    HAZARDS,
    X86,
    Argument,
    calls,
    first,
    hazard,
    read,
    syscall,
    writes,
)

# --- namespaces and mounts ------------------------------------------------------------------------

_NEWNS, _NEWUSER = 0x20000, 0x10000000
calls("user namespace by unshare", "unshare", _NEWUSER)
calls("mount namespace by unshare", "unshare", _NEWNS)
calls("mount a tmpfs", "mount", b"none", b"/tmp", b"tmpfs", 0, None)
calls("mount proc anew, without masks", "mount", b"proc", b"/tmp", b"proc", 0, None)
calls("mount a cgroup hierarchy (release_agent)", "mount", b"none", b"/tmp", b"cgroup", 0, b"memory")
calls("mount cgroup2", "mount", b"none", b"/tmp", b"cgroup2", 0, None)
calls(
    "mount the host's disk",
    *("mount", b"/dev/vda1", b"/tmp", b"ext4", 1, None),
    reached=(errno.ENOENT, errno.ENOTBLK, errno.ENXIO, errno.ENODEV, errno.EINVAL, errno.EBUSY),
)
calls("mount sysfs", "mount", b"none", b"/tmp", b"sysfs", 0, None)
calls("remount /proc/sys writable", "mount", b"none", b"/proc/sys", b"none", 0x20 | 0x1000, None)
calls("take a mask off /proc", "umount2", b"/proc/sys", 2)
calls("new mount API: fsopen", "fsopen", b"tmpfs", 0)
calls("new mount API: open_tree clone", "open_tree", -100, b"/", 1)
calls("new mount API: mount_setattr", "mount_setattr", -100, b"/", 0, b"\0" * 32, 32)
calls("pivot_root", "pivot_root", b"/tmp", b"/tmp", reached=(errno.EINVAL, errno.EBUSY))
calls("chroot", "chroot", b"/tmp")


def _clone(name: str, *arguments: Argument) -> str:
    pid = syscall(name, *arguments)
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return "done"


@hazard("user namespace by clone")
def _clone_user() -> str | None:
    return _clone("clone", _NEWUSER | signal.SIGCHLD, None, None, None, None)


@hazard("user namespace by clone3")
def _clone3_user() -> str | None:
    arguments = ctypes.create_string_buffer(struct.pack("=11Q", _NEWUSER, 0, 0, 0, signal.SIGCHLD, *[0] * 6))
    return _clone("clone3", arguments, 88)


@hazard("enter the namespaces of process 1")
def _setns() -> str | None:
    fd = os.open("/proc/1/ns/mnt", os.O_RDONLY)
    syscall("setns", fd, _NEWNS)
    return "done"


# --- /proc and /sys -------------------------------------------------------------------------------

writes("write core_pattern", "/proc/sys/kernel/core_pattern", "/proc/self/../sys/kernel/core_pattern")
writes("write modprobe and hotplug paths", "/proc/sys/kernel/modprobe", "/proc/sys/kernel/hotplug")
writes("write sysrq-trigger", "/proc/sysrq-trigger")
writes("write other switches below /proc/sys", "/proc/sys/vm/panic_on_oom", "/proc/sys/kernel/hostname")
writes("write binfmt_misc", "/proc/sys/fs/binfmt_misc/register")
writes("write interrupt routing", "/proc/irq/default_smp_affinity")
writes("write cgroup release_agent", *(f"/sys/fs/cgroup/{d}release_agent" for d in ("", "memory/", "rdma/")))
writes(
    "write a cgroup's list of devices",
    *(f"/sys/fs/cgroup/devices/{d}devices.allow" for d in ("", "docker/")),
)
writes("write uevent_helper", "/sys/kernel/uevent_helper")
writes("write power state and firmware", "/sys/power/state", "/sys/firmware/acpi/pm_profile")


@hazard("write any cgroup file")
def _cgroup_files() -> str | None:
    found = [os.path.join(d, n) for d, _, names in os.walk("/sys/fs/cgroup") for n in names][:5000]
    return first(found, lambda p: os.close(os.open(p, os.O_WRONLY)))


@hazard("write any file of /sys")
def _sys_files() -> str | None:
    found = [os.path.join(d, n) for d, _, names in os.walk("/sys/kernel") for n in names][:5000]
    return first(found, lambda p: os.close(os.open(p, os.O_WRONLY)))


def _reads(hazard_name: str, *paths: str) -> None:
    def attempt(path: str) -> None:
        if not read(path, 64).strip(b"\0 \n"):
            raise OSError(errno.ENODATA, "empty")

    HAZARDS[hazard_name] = lambda: first(paths, attempt)


_reads("read kernel memory by /proc", "/proc/kcore", "/proc/kmem", "/dev/mem", "/dev/kmem")
_reads("read keys and timers of the host", "/proc/keys", "/proc/timer_list", "/proc/sched_debug")
_reads("read the kernel's log", "/proc/kmsg", "/dev/kmsg")
_reads("read interrupts and load of the host", "/proc/interrupts", "/proc/pressure/cpu")
_reads("read the machine's identity", "/sys/class/dmi/id/product_uuid", "/etc/machine-id")
_reads(
    "read the host's secrets",
    *("/etc/shadow", "/etc/ssh/ssh_host_ed25519_key", "/root/.ssh/id_rsa"),
    "/var/run/secrets/kubernetes.io/serviceaccount/token",
)
_reads("read the block devices' I/O by /sys", "/sys/block/vda/stat", "/sys/block/sda/stat")


@hazard("read the environment or memory map of process 1")
def _init_environment() -> str | None:
    if os.getppid() == 1:
        return None  # it is the program itself
    return first(["/proc/1/environ", "/proc/1/maps"], read)


@hazard("read kernel addresses")
def _kallsyms() -> str | None:
    lines = read("/proc/kallsyms", 4096).splitlines()
    return "addresses" if any(int(line.split()[0], 16) for line in lines if line) else None


@hazard("walk to the host by /proc/1/root")
def _init_root() -> str | None:
    listing = os.listdir("/proc/1/root")
    return "listed" if set(listing) - set(os.listdir("/")) else None


@hazard("lower its own oom_score_adj")
def _oom_score() -> str | None:
    Path("/proc/self/oom_score_adj").write_text("-1000")
    return "done"


# --- devices and file handles ---------------------------------------------------------------------

calls("make a block device", "mknodat", -100, b"/tmp/probe-disk", 0o60666, os.makedev(8, 0))
calls("make a character device", "mknodat", -100, b"/tmp/probe-mem", 0o20666, os.makedev(1, 1))
_HANDLE = ctypes.create_string_buffer(struct.pack("=Ii", 8, 1) + struct.pack("=II", 2, 0) + b"\0" * 120)
calls(
    "open_by_handle_at (dac_read_search)",
    *("open_by_handle_at", -100, _HANDLE, os.O_RDONLY),
    reached=(errno.ESTALE, errno.EBADF, errno.EINVAL, errno.EOPNOTSUPP),
)
calls(
    "name_to_handle_at",
    *("name_to_handle_at", -100, b"/", ctypes.create_string_buffer(struct.pack("=Ii", 128, 0) + b"\0" * 128)),
    *(ctypes.create_string_buffer(8), 0),
    reached=(errno.EOVERFLOW, errno.EOPNOTSUPP),
)


@hazard("use a device that is more than null, zero, full, random")
def _devices() -> str | None:
    harmless = {(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 2), (5, 1)}
    for directory, _, names in os.walk("/dev"):
        for name in names:
            path = os.path.join(directory, name)
            with contextlib.suppress(OSError):
                status = os.stat(path)
                number = (os.major(status.st_rdev), os.minor(status.st_rdev))
                if status.st_rdev and number not in harmless and not 136 <= number[0] <= 143:
                    os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))
                    return path
    return None


@hazard("push input into a terminal (TIOCSTI)")
def _tiocsti() -> str | None:
    """On no terminal the kernel says ENOTTY: then the call itself got through."""
    try:
        fcntl.ioctl(0, 0x5412, b"x")
    except OSError as error:
        if error.errno == errno.ENOTTY:
            return "reached: ENOTTY"
        raise
    return "done"


# --- the rest of the kernel's interface -----------------------------------------------------------

_HOLLOW = ctypes.create_string_buffer(256)
_BAD = (errno.EINVAL, errno.EFAULT, errno.E2BIG, errno.ENOENT, errno.EBADF, errno.ESRCH)
calls("bpf", "bpf", 0, ctypes.create_string_buffer(struct.pack("=IIII", 2, 4, 4, 1) + b"\0" * 56), 72)
calls("userfaultfd", "userfaultfd", 1, reached=_BAD)
calls("io_uring", "io_uring_setup", 4, ctypes.create_string_buffer(120), reached=_BAD)
calls("perf events", "perf_event_open", _HOLLOW, 0, -1, -1, 0, reached=_BAD)
calls("load a module", "init_module", _HOLLOW, 8, b"", reached=(*_BAD, errno.ENOEXEC))
calls("load a module from a file", "finit_module", 0, b"", 0, reached=(*_BAD, errno.ENOEXEC))
calls("kexec", "kexec_load", 0, 99, None, -1, reached=_BAD)
calls("reboot", "reboot", 0, 0, 0, None, reached=_BAD)
calls("swapon", "swapon", b"/nonexistent", 0, reached=_BAD)
calls("process accounting", "acct", b"/nonexistent", reached=_BAD)
calls("kernel log by syslog", "syslog", 10, None, 0)
calls("disk quotas", "quotactl", 0x800002, b"/nonexistent", 0, None, reached=(*_BAD, errno.ENOTBLK))
calls("turn off address randomisation", "personality", 0x0040000)
calls("keyring: new session", "keyctl", 1, None, 0, 0, 0)
calls("keyring: add a key", "add_key", b"user", b"probe", b"x", 1, -3)
calls("keyring: ask the host's helper for a key", "request_key", b"user", b"probe", b"x", -3, reached=(126,))
calls("fanotify", "fanotify_init", 0, 0, reached=_BAD)
calls("directory cookies", "lookup_dcookie", 0, _HOLLOW, 256, reached=_BAD)
calls("port I/O (iopl)", "iopl", 3)
calls("segment tables (modify_ldt)", "modify_ldt", 0, _HOLLOW, 256)
calls("pages shared with other users' (KSM)", "prctl", 67, 1, 0, 0, 0)
calls("ptrace", "ptrace", 0, 0, None, None)
calls("compare kernel objects (kcmp)", "kcmp", os.getpid(), os.getpid(), 1, 0, 0)


@hazard("set the clock")
def _clock() -> str | None:
    seconds, nanoseconds = divmod(time.time_ns(), 10**9)
    syscall("clock_settime", 0, ctypes.create_string_buffer(struct.pack("=qq", seconds, nanoseconds)))
    return "done"


@hazard("read another process's memory (process_vm_readv)")
def _vm_readv() -> str | None:
    secret = ctypes.create_string_buffer(b"x", 8)
    vector = struct.pack("=QQ", ctypes.addressof(secret), 8)
    child = os.fork()
    if child == 0:
        time.sleep(5)
        os._exit(0)
    try:
        buffers = [ctypes.create_string_buffer(vector) for _ in range(2)]
        syscall("process_vm_readv", child, buffers[0], 1, buffers[1], 1, 0)
    finally:
        os.kill(child, signal.SIGKILL)
    return "done"


@hazard("take a descriptor out of another process")
def _pidfd_getfd() -> str | None:
    os.close(syscall("pidfd_getfd", os.pidfd_open(os.getpid()), 0, 0))
    return "done"


@hazard("32-bit system calls")
def _int80() -> str | None:
    if not X86:
        return None
    memory = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    memory.write(bytes.fromhex("53b814000000cd805bc3"))  # push rbx; mov eax, 20; int 0x80; pop rbx; ret
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    pid: int = ctypes.CFUNCTYPE(ctypes.c_int)(address)()
    return "getpid" if pid == os.getpid() else None
