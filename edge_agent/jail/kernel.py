"""The system calls that Python has no name for, each as a thin function that raises OSError.

Needs Linux 5.12 or later (mount_setattr); system call numbers above 423 are the same on every architecture.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import socket
import struct

CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
CLONE_PARENT = 0x00008000
_CLONE_INTO_CGROUP = 0x200000000

MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_RDONLY = 0x2, 0x4, 0x8, 0x20, 0x1
MS_REC, MS_PRIVATE = 0x4000, 0x40000
MNT_DETACH = 2

ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV, ATTR_NOEXEC = 0x1, 0x2, 0x4, 0x8

CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_FOWNER, CAP_KILL, CAP_SETGID, CAP_SETUID = 0, 1, 3, 5, 6, 7
CAPABILITIES = {
    CAP_CHOWN: "chown",
    CAP_DAC_OVERRIDE: "dac_override",
    CAP_FOWNER: "fowner",
    CAP_KILL: "kill",
    CAP_SETGID: "setgid",
    CAP_SETUID: "setuid",
}

_SYS_OPEN_TREE, _SYS_MOVE_MOUNT, _SYS_CLONE3, _SYS_OPENAT2, _SYS_MOUNT_SETATTR = 428, 429, 435, 437, 442
_SYS_QUOTACTL_FD = 443  # Linux 5.14
_AT_FDCWD = -100
_AT_EMPTY_PATH, _AT_RECURSIVE = 0x1000, 0x8000
_OPEN_TREE_CLONE = 1
_MOVE_MOUNT_F_EMPTY_PATH = 4
_RESOLVE_NO_MAGICLINKS, _RESOLVE_NO_SYMLINKS, _RESOLVE_BENEATH = 0x02, 0x04, 0x08
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_PDEATHSIG, _PR_SET_NAME, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT = 1, 15, 24, 38, 47
_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2
_PR_CAP_AMBIENT_CLEAR_ALL = 4
_CAP_VERSION_3 = 0x20080522
_FAN_CLOEXEC, _FAN_NONBLOCK, _FAN_CLASS_CONTENT = 0x01, 0x02, 0x04
_FAN_UNLIMITED_QUEUE, _FAN_UNLIMITED_MARKS = 0x10, 0x20
_FAN_MARK_ADD, _FAN_MARK_REMOVE, _FAN_OPEN_PERM = 0x01, 0x02, 0x10000
_FAN_EVENT = struct.Struct("=IBBHQii")  # length, version, reserved, length of the header, mask, fd, pid
_FAN_RESPONSE = struct.Struct("=iI")
_FAN_ALLOW = 1
_FAN_READ = 4096
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 0x1

_libc = ctypes.CDLL(None, use_errno=True)
# The variant that keeps the GIL: between clone and the child's return nothing else may touch the interpreter.
_libc_with_gil = ctypes.PyDLL(None, use_errno=True)


class _CloneArgs(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_uint64)
        for name in (
            *("flags", "pidfd", "child_tid", "parent_tid", "exit_signal", "stack", "stack_size", "tls"),
            *("set_tid", "set_tid_size", "cgroup"),
        )
    ]


class _OpenHow(ctypes.Structure):
    _fields_ = [("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64)]


class _MountAttr(ctypes.Structure):
    _fields_ = [
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    ]


class _FilterProgram(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p)]


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _syscall(number: int, *args: object) -> int:
    whole = [ctypes.c_long(a) if isinstance(a, int) else a for a in args]
    return _checked(_libc.syscall(ctypes.c_long(number), *whole))


# --- processes and privileges ----------------------------------------------------------------------


def clone(flags: int, into_cgroup: int | None = None) -> int:
    """A fork with new namespaces: 0 in the child. Only for a process with one thread, since nothing is done
    for the other ones; the interpreter's own hooks for a fork are about them, and would touch half a megabyte
    in each child. What differs from os.fork: generators seeded before go on alike in both.

    `into_cgroup` is the descriptor of a cgroup v2 directory in which the child starts.
    """
    # With CLONE_PARENT it is the caller's own signal.
    args = _CloneArgs(flags=flags, exit_signal=0 if flags & CLONE_PARENT else signal.SIGCHLD)
    if into_cgroup is not None:
        args.flags |= _CLONE_INTO_CGROUP
        args.cgroup = into_cgroup
    number, pointer, size = ctypes.c_long(_SYS_CLONE3), ctypes.byref(args), ctypes.c_long(ctypes.sizeof(args))
    return _checked(_libc_with_gil.syscall(number, pointer, size))


def exists(pid: int) -> bool:
    """Running, or a zombie that nobody has waited for."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def unshare(flags: int) -> None:
    _checked(_libc.unshare(ctypes.c_int(flags)))


def enter_namespace(fd: int, kind: int) -> None:
    _checked(_libc.setns(ctypes.c_int(fd), ctypes.c_int(kind)))


def _prctl(option: int, *args: int) -> None:
    whole = [ctypes.c_ulong(a) for a in (*args, 0, 0, 0, 0)[:4]]
    _checked(_libc.prctl(ctypes.c_int(option), *whole))


def die_with_parent() -> None:
    """SIGKILL when the parent ends. The kernel forgets it when credentials change: set it after that, and
    then check that the parent still lives."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def adopt_orphans() -> None:
    """Descendants whose parent ends become children of this process."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def no_new_privs() -> None:
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def filter_system_calls(program: bytes) -> None:
    """For good, and for all that this process starts. Comes after `no_new_privs`."""
    buffer = ctypes.create_string_buffer(program, len(program))
    header = _FilterProgram(len(program) // 8, ctypes.addressof(buffer))
    _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(header))


def set_name(name: str) -> None:
    """What ps shows as the command; cut at 15 bytes."""
    buffer = ctypes.create_string_buffer(name.encode())
    _checked(_libc.prctl(ctypes.c_int(_PR_SET_NAME), buffer, 0, 0, 0))


def keep_capabilities(kept: tuple[int, ...]) -> None:
    """Drops all capabilities but `kept` from the permitted and effective sets, and *all* from the bounding,
    inheritable and ambient ones: nothing that this process ever executes gets any back."""
    for capability in range(64):
        try:
            _prctl(_PR_CAPBSET_DROP, capability)
        except OSError:
            if capability == 0:  # else: past the last one that this kernel knows
                raise
            break
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    _set_capabilities(kept)


def drop_capabilities() -> None:
    """Drops what the permitted, effective and inheritable sets still hold."""
    _set_capabilities(())


def _set_capabilities(kept: tuple[int, ...]) -> None:
    mask = sum(1 << c for c in kept)
    low, high = mask & 0xFFFFFFFF, mask >> 32
    header = struct.pack("=II", _CAP_VERSION_3, 0)
    data = struct.pack("=6I", low, low, 0, high, high, 0)
    _checked(_libc.capset(header, data))


# --- files and mounts ------------------------------------------------------------------------------


def open_beneath(root: int, path: str, flags: int) -> int:
    """Opens `path` under the directory `root`, following no symlink and leaving it by no way."""
    how = _OpenHow(flags | os.O_CLOEXEC, 0, _RESOLVE_BENEATH | _RESOLVE_NO_SYMLINKS | _RESOLVE_NO_MAGICLINKS)
    encoded = ctypes.c_char_p(os.fsencode(path))
    return _syscall(_SYS_OPENAT2, root, encoded, ctypes.byref(how), ctypes.sizeof(how))


def quotactl(directory: int, command: int, uid: int, data: bytearray) -> None:
    """quotactl_fd: about the file system of `directory`. `data` is read or written, as `command` says."""
    buffer = (ctypes.c_char * len(data)).from_buffer(data)
    _syscall(_SYS_QUOTACTL_FD, directory, command, uid, ctypes.byref(buffer))


def watch_opens() -> int:
    """A fanotify group: whoever opens a file that is marked in it waits until that is allowed, or until the
    group is closed."""
    flags = _FAN_CLOEXEC | _FAN_NONBLOCK | _FAN_CLASS_CONTENT | _FAN_UNLIMITED_QUEUE | _FAN_UNLIMITED_MARKS
    return _checked(_libc.fanotify_init(ctypes.c_uint(flags), ctypes.c_uint(os.O_RDONLY | os.O_CLOEXEC)))


def mark_file(group: int, fd: int, marked: bool) -> None:
    """Marks the file that `fd` has open, whatever it is called, or takes its mark away."""
    flags = ctypes.c_uint(_FAN_MARK_ADD if marked else _FAN_MARK_REMOVE)
    path = f"/proc/self/fd/{fd}".encode()
    _checked(_libc.fanotify_mark(group, flags, ctypes.c_uint64(_FAN_OPEN_PERM), _AT_FDCWD, path))


def waiting_opens(group: int) -> list[tuple[int, int]]:
    """Those that have come to wait: a descriptor of the file, which is the caller's, and the process's id.
    Descriptor -1: the kernel could not open it for us."""
    try:
        data = os.read(group, _FAN_READ)
    except BlockingIOError:
        return []
    found = []
    while data:
        length, _, _, _, _, fd, pid = _FAN_EVENT.unpack_from(data)
        found.append((fd, pid))
        data = data[length:]
    return found


def allow_open(group: int, fd: int) -> None:
    """`fd` as `waiting_opens` gave it; it stays the caller's."""
    os.write(group, _FAN_RESPONSE.pack(fd, _FAN_ALLOW))


def mount(kind: str, target: str, flags: int, options: str = "") -> None:
    encoded = (kind.encode(), os.fsencode(target), kind.encode())
    _checked(_libc.mount(*encoded, ctypes.c_ulong(flags), options.encode()))


def detach(target: str) -> None:
    """Unmounts `target` with all below it, now from the tree and in fact when nobody uses it."""
    _checked(_libc.umount2(os.fsencode(target), MNT_DETACH))


def pivot_root(new: str, old: str) -> None:
    _checked(_libc.pivot_root(os.fsencode(new), os.fsencode(old)))


def clone_tree(source: str) -> int:
    """A descriptor of a copy of the mounts at `source` and below, attached nowhere yet."""
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC | _AT_RECURSIVE
    return _syscall(_SYS_OPEN_TREE, _AT_FDCWD, ctypes.c_char_p(os.fsencode(source)), flags)


def clone_tree_of(fd: int) -> int:
    """As `clone_tree`, of what `fd` has open; submounts are left out."""
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC | _AT_EMPTY_PATH
    return _syscall(_SYS_OPEN_TREE, fd, ctypes.c_char_p(b""), flags)


def set_mount_attributes(tree: int, attributes: int) -> None:
    """Sets `attributes` on all mounts of `tree` and makes them private."""
    attr = _MountAttr(attr_set=attributes, propagation=MS_PRIVATE)
    flags = _AT_EMPTY_PATH | _AT_RECURSIVE
    _syscall(
        _SYS_MOUNT_SETATTR,
        tree,
        ctypes.c_char_p(b""),
        flags,
        ctypes.byref(attr),
        ctypes.sizeof(attr),
    )


def attach_tree(tree: int, target: str) -> None:
    """Mounts `tree` at `target`, which must exist; a symlink there is not followed."""
    encoded = ctypes.c_char_p(os.fsencode(target))
    _syscall(_SYS_MOVE_MOUNT, tree, ctypes.c_char_p(b""), _AT_FDCWD, encoded, _MOVE_MOUNT_F_EMPTY_PATH)


def loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        request = struct.pack("16sh14x", b"lo", 0)
        flags = struct.unpack("16sh14x", fcntl.ioctl(s, _SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(s, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | _IFF_UP))
