"""The operations that a root filesystem is made of, and the loopback interface.

Whoever carries them out is real root, in a mount namespace of its own, before it gives up anything. What must
hold: after `PivotRoot` nothing of the old root can be reached.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from dataclasses import dataclass

from edge_agent.jail import kernel


@dataclass(frozen=True, slots=True)
class PrivateMounts:
    """From here on no mount goes in or out of this namespace."""

    def describe(self) -> str:
        return "make all mounts private"

    def execute(self) -> None:
        kernel.mount("none", "/", kernel.MS_REC | kernel.MS_PRIVATE)


@dataclass(frozen=True, slots=True)
class Tmpfs:
    """`size` in bytes. Devices work only where `devices`. `files`: at most so many, if not 0."""

    target: str
    size: int
    mode: int = 0o755
    devices: bool = False
    files: int = 0

    def describe(self) -> str:
        return f"mount a tmpfs of {self.size >> 10} KiB at {self.target}"

    def execute(self) -> None:
        os.makedirs(self.target, 0o755, exist_ok=True)
        flags = kernel.MS_NOSUID | (0 if self.devices else kernel.MS_NODEV)
        most = f",nr_inodes={self.files}" if self.files else ""
        kernel.mount("tmpfs", self.target, flags, f"size={self.size},mode={self.mode:o}{most}")


@dataclass(frozen=True, slots=True)
class Bind:
    """A copy of what is mounted at `source` and below. Never with setuid programs or devices."""

    source: str
    target: str
    read_only: bool = True

    def describe(self) -> str:
        return f"bind {self.source} {'read-only' if self.read_only else 'read-write'} at {self.target}"

    def execute(self) -> None:
        _attach(kernel.clone_tree(self.source), self.target, self.read_only)


@dataclass(frozen=True, slots=True)
class BindBeneath:
    """As Bind, of the directory `path` under `root`, reached without any symlink: for names that the daemon
    chose and directories that it may write to."""

    root: str
    path: str
    target: str
    read_only: bool = True

    def describe(self) -> str:
        how = "read-only" if self.read_only else "read-write"
        return f"bind {self.path} of {self.root} {how} at {self.target}"

    def execute(self) -> None:
        _attach(clone_beneath(self.root, self.path), self.target, self.read_only)


@dataclass(frozen=True, slots=True)
class Attach:
    """Mounts `tree`, a descriptor that `state_tree` gave, and closes it."""

    tree: int
    target: str

    def describe(self) -> str:
        return f"attach what was given at {self.target}"

    def execute(self) -> None:
        try:
            kernel.attach_tree(self.tree, self.target)
        finally:
            os.close(self.tree)


def clone_beneath(root: str, path: str) -> int:
    """A descriptor of a copy of the mount of the directory `path` under `root`, attached nowhere yet."""
    above = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        directory = kernel.open_beneath(above, path, os.O_PATH | os.O_DIRECTORY)
    finally:
        os.close(above)
    try:
        return kernel.clone_tree_of(directory)
    finally:
        os.close(directory)


def state_tree(root: str, path: str) -> int:
    """As `clone_beneath`, ready to be attached where an agent may write."""
    tree = clone_beneath(root, path)
    try:
        _restrict(tree, read_only=False)
    except OSError:
        os.close(tree)
        raise
    return tree


def _attach(tree: int, target: str, read_only: bool) -> None:
    try:
        _make_mount_point(tree, target)
        _restrict(tree, read_only)
        kernel.attach_tree(tree, target)
    finally:
        os.close(tree)


def _restrict(tree: int, read_only: bool) -> None:
    attributes = kernel.ATTR_NOSUID | kernel.ATTR_NODEV
    kernel.set_mount_attributes(tree, attributes | (kernel.ATTR_RDONLY if read_only else 0))


def _make_mount_point(tree: int, target: str) -> None:
    if stat.S_ISDIR(os.fstat(tree).st_mode):
        os.makedirs(target, 0o755, exist_ok=True)
        return
    os.makedirs(os.path.dirname(target), 0o755, exist_ok=True)
    if not os.path.lexists(target):
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444))


@dataclass(frozen=True, slots=True)
class Proc:
    """The processes of the new pid namespace; of those, a user sees its own."""

    target: str

    def describe(self) -> str:
        return f"mount proc at {self.target}"

    def execute(self) -> None:
        os.makedirs(self.target, 0o755, exist_ok=True)
        flags = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
        kernel.mount("proc", self.target, flags, "hidepid=2")


@dataclass(frozen=True, slots=True)
class Hide:
    """Covers `target`, if this kernel has it, with the empty file or the empty directory."""

    target: str
    empty_file: str
    empty_dir: str

    def describe(self) -> str:
        return f"hide {self.target}"

    def execute(self) -> None:
        if os.path.lexists(self.target):
            cover = self.empty_dir if os.path.isdir(self.target) else self.empty_file
            _attach(kernel.clone_tree(cover), self.target, read_only=True)


@dataclass(frozen=True, slots=True)
class ReadOnly:
    """Makes `target`, which is there or not, read-only with all below it."""

    target: str

    def describe(self) -> str:
        return f"make {self.target} read-only"

    def execute(self) -> None:
        if os.path.lexists(self.target):
            _attach(kernel.clone_tree(self.target), self.target, read_only=True)


@dataclass(frozen=True, slots=True)
class Directory:
    target: str
    mode: int = 0o755

    def describe(self) -> str:
        return f"make directory {self.target}"

    def execute(self) -> None:
        os.makedirs(self.target, self.mode, exist_ok=True)


@dataclass(frozen=True, slots=True)
class File:
    target: str
    text: str = ""

    def describe(self) -> str:
        return f"write {self.target}"

    def execute(self) -> None:
        os.makedirs(os.path.dirname(self.target), 0o755, exist_ok=True)
        fd = os.open(self.target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444)
        with open(fd, "w") as file:
            file.write(self.text)


@dataclass(frozen=True, slots=True)
class CopyFile:
    """A copy that all in this root can read, of a file of at most `most` bytes."""

    source: str
    target: str
    most: int

    def describe(self) -> str:
        return f"copy {self.source} to {self.target}"

    def execute(self) -> None:
        os.makedirs(os.path.dirname(self.target), 0o755, exist_ok=True)
        with open(self.source, "rb") as file:
            content = file.read(self.most + 1)
        if len(content) > self.most:
            raise OSError(errno.EFBIG, f"more than {self.most} bytes", self.source)
        fd = os.open(self.target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444)
        with open(fd, "wb") as copy:
            copy.write(content)


@dataclass(frozen=True, slots=True)
class CopyFiles:
    """Copies of the files in a directory, those in further ones left out."""

    source: str
    target: str
    most: int

    def describe(self) -> str:
        return f"copy the files in {self.source} to {self.target}"

    def execute(self) -> None:
        os.makedirs(self.target, 0o755, exist_ok=True)
        for name in os.listdir(self.source):
            if os.path.isfile(f"{self.source}/{name}"):
                CopyFile(f"{self.source}/{name}", f"{self.target}/{name}", self.most).execute()


@dataclass(frozen=True, slots=True)
class Link:
    target: str
    to: str

    def describe(self) -> str:
        return f"link {self.target} to {self.to}"

    def execute(self) -> None:
        os.makedirs(os.path.dirname(self.target), 0o755, exist_ok=True)
        os.symlink(self.to, self.target)


@dataclass(frozen=True, slots=True)
class Device:
    """A character device that anyone may use."""

    target: str
    major: int
    minor: int

    def describe(self) -> str:
        return f"make device {self.target}"

    def execute(self) -> None:
        os.makedirs(os.path.dirname(self.target), 0o755, exist_ok=True)
        os.mknod(self.target, 0o666 | stat.S_IFCHR, os.makedev(self.major, self.minor))
        os.chmod(self.target, 0o666)


@dataclass(frozen=True, slots=True)
class CopyDevice:
    """A node for the device that `source` is, which the host may guard by owner and mode; the jail's own node
    is for its agent, whose /dev nobody else sees."""

    source: str
    target: str

    def describe(self) -> str:
        return f"make {self.target}, the device {self.source}"

    def execute(self) -> None:
        status = os.stat(self.source)  # through links, as those of udev
        kind = stat.S_IFMT(status.st_mode)
        if kind not in (stat.S_IFCHR, stat.S_IFBLK):
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV), self.source)
        os.makedirs(os.path.dirname(self.target), 0o755, exist_ok=True)
        os.mknod(self.target, 0o600 | kind, status.st_rdev)
        os.chmod(self.target, 0o666)


@dataclass(frozen=True, slots=True)
class PivotRoot:
    """Makes `new` the root and lets go of the old one."""

    new: str

    def describe(self) -> str:
        return f"make {self.new} the root"

    def execute(self) -> None:
        os.chdir(self.new)
        kernel.pivot_root(".", ".")  # stacks the old root over the new one ...
        kernel.detach(".")  # ... and this takes it off
        os.chdir("/")


@dataclass(frozen=True, slots=True)
class CopyRoot:
    """Shows the whole root, as it is mounted now, at `target` once more."""

    target: str

    def describe(self) -> str:
        return f"bind the root at {self.target}"

    def execute(self) -> None:
        tree = kernel.clone_tree("/")
        try:
            kernel.attach_tree(tree, self.target)
        finally:
            os.close(tree)


@dataclass(frozen=True, slots=True)
class Chroot:
    """Makes `target`, a mount beneath the root, this process's root. The kernel then refuses it and its
    children a user namespace."""

    target: str

    def describe(self) -> str:
        return f"chroot to {self.target}"

    def execute(self) -> None:
        os.chroot(self.target)
        os.chdir("/")


@dataclass(frozen=True, slots=True)
class SealRoot:
    """Makes the root filesystem itself read-only; what is mounted on it stays as it is."""

    def describe(self) -> str:
        return "make the root read-only"

    def execute(self) -> None:
        flags = kernel.MS_REMOUNT | kernel.MS_RDONLY | kernel.MS_NOSUID
        kernel.mount("tmpfs", "/", flags, "")


@dataclass(frozen=True, slots=True)
class LoopbackUp:
    def describe(self) -> str:
        return "bring the loopback interface up"

    def execute(self) -> None:
        kernel.loopback_up()


@dataclass(frozen=True, slots=True)
class HostName:
    name: str

    def describe(self) -> str:
        return f"set the host name to {self.name}"

    def execute(self) -> None:
        socket.sethostname(self.name)
