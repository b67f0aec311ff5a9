"""The two roots that the jailer builds: a jail's and the daemon's. Pure: what is on the machine comes in as a
`System`, a list of operations comes out."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from edge_agent.config import CA_FILE, CREDENTIALS, MAX_CREDENTIAL
from edge_agent.jail import plan
from edge_agent.jail.config import JailerConfig
from edge_agent.jail.operations import Operation
from edge_agent.jail.protocol import AGENT_ID, Make, Refused, Way

# What agents import of roost.
SDK = ("__init__.py", "agent.py", "_effects.py", "_line.py", "_tasks.py", "_timers.py")
_ZYGOTE = ("zygote.py", "_memory.py")  # and zygotes
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
_OF_ETC = ("/etc/ld.so.cache", "/etc/ssl/certs", "/etc/pki/tls/certs", "/etc/pki/ca-trust/extracted")
# Of the whole kernel, or with switches in it. None may be written to; those in the second list tell about
# the machine, or about others on it, and are not even shown.
_PROC_READ_ONLY = ("sys", "irq", "bus", "fs", "sysrq-trigger")
_PROC_HIDDEN = (
    "acpi",
    "asound",
    "interrupts",
    "kallsyms",
    "kcore",
    "keys",
    "key-users",
    "latency_stats",
    "modules",
    "pressure",
    "sched_debug",
    "scsi",
    "timer_list",
    "timer_stats",
)
_DEVICES = (("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9))
_DEV_LINKS = (("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2"))
_TASK_FILES = 16_384  # in a task's /state: the daemon looks at each
_ROOT_BYTES, _DAEMON_TMP_BYTES = 1 << 20, 256 << 20
_MAX_CA = 512 << 10


@dataclass(frozen=True, slots=True)
class System:
    """What of this machine and this program is shown inside. `links`: symlinks and where they lead, like
    /lib of a merged /usr."""

    directories: tuple[str, ...]
    links: tuple[tuple[str, str], ...]
    of_etc: tuple[str, ...]
    localtime: str | None
    resolver: str | None  # the directory outside of /etc that holds resolv.conf
    prefix: str  # of the running interpreter; of a virtual environment, if it is one
    base_prefix: str
    sources: str  # the directory with this program's packages

    @classmethod
    def survey(cls) -> System:
        present = [d for d in _SYSTEM if os.path.lexists(d)]
        localtime = os.path.realpath("/etc/localtime")
        resolver = os.path.dirname(os.path.realpath("/etc/resolv.conf"))
        return cls(
            directories=tuple(d for d in present if not os.path.islink(d)),
            links=tuple((d, os.readlink(d)) for d in present if os.path.islink(d)),
            of_etc=tuple(p for p in _OF_ETC if os.path.exists(p)),
            localtime=localtime if localtime.startswith("/usr/") else None,
            resolver=None if resolver == "/etc" or not os.path.isdir(resolver) else resolver,
            prefix=os.path.realpath(sys.prefix),
            base_prefix=os.path.realpath(sys.base_prefix),
            sources=str(Path(__file__).resolve().parents[2]),
        )


def jail_plan(request: Make, system: System, config: JailerConfig) -> tuple[Operation, ...]:
    """The root of one jail, and what else its namespaces hold. Carried out by its init before it leaves the
    initial user namespace, to which all these namespaces therefore belong: root inside has no power over any
    of them."""
    new = str(config.new_root)
    state: Operation
    if request.way is Way.TASK:
        state = plan.Tmpfs(new + "/state", _half(request), 0o1777, files=_TASK_FILES)
    else:
        state = plan.BindBeneath(
            str(config.jails_dir), f"{request.jail_id}/state", new + "/state", read_only=False
        )
    return (
        *_jail_tree(request, system, config),
        state,
        plan.PivotRoot(new),
        plan.SealRoot(),
        plan.LoopbackUp(),
        plan.HostName(request.jail_id[:63]),
    )


def shell_mounts(request: Make, system: System, config: JailerConfig) -> tuple[Operation, ...]:
    """As a jail's root, with a place for a state and none there."""
    new = str(config.new_root)
    return (
        *_jail_tree(request, system, config),
        plan.Directory(new + "/state"),
        plan.PivotRoot(new),
        plan.SealRoot(),
    )


def empty_plan(config: JailerConfig) -> tuple[Operation, ...]:
    """A root with nothing in it."""
    new = str(config.new_root)
    return (plan.PrivateMounts(), plan.Tmpfs(new, _ROOT_BYTES), plan.PivotRoot(new), plan.SealRoot())


def jail_state(jail_id: str, config: JailerConfig) -> int:
    """What `plan.Attach` mounts in a shell that becomes this jail, and the file service serves."""
    return plan.state_tree(str(config.jails_dir), f"{jail_id}/state")


def zygote_plan(request: Make, system: System, config: JailerConfig) -> tuple[Operation, ...]:
    """As a jail's root, without a state. Ends chrooted: see `plan.Chroot`."""
    new = str(config.new_root)
    inner = "/run/inner"
    return (
        *_jail_tree(request, system, config),
        *(plan.Bind(f"{system.sources}/roost/{name}", f"{new}/roost/roost/{name}") for name in _ZYGOTE),
        plan.Directory(new + inner),
        plan.PivotRoot(new),
        plan.CopyRoot(inner),
        plan.SealRoot(),
        plan.HostName(request.jail_id[:63]),
        plan.Chroot(inner),
    )


def _jail_tree(request: Make, system: System, config: JailerConfig) -> tuple[Operation, ...]:
    new = str(config.new_root)
    half = _half(request)
    return (
        plan.PrivateMounts(),
        plan.Tmpfs(new, _ROOT_BYTES, devices=True),
        *_system(new, system),
        plan.Tmpfs(new + "/dev/shm", half, 0o1777),
        plan.Tmpfs(new + "/tmp", half, 0o1777),
        *_outside((system.base_prefix,), system, new),
        *_etc(new, system),
        *_dev(new),
        *_named_devices(new, request, config),
        *_proc(new),
        plan.BindBeneath(str(config.bundles_dir), request.bundle, new + "/agent"),
        *_packages(request, config),
        *(plan.Bind(f"{system.sources}/roost/{name}", f"{new}/roost/roost/{name}") for name in SDK),
    )


def _half(request: Make) -> int:
    """Bytes of a file system in memory, which counts against the jail's memory anyway."""
    return max(1 << 20, request.limits.memory_bytes // 2)


def _packages(request: Make, config: JailerConfig) -> tuple[Operation, ...]:
    if not request.packages:
        return ()
    state = f"{request.packages}/state"
    return (plan.BindBeneath(str(config.jails_dir), state, f"{config.new_root}/packages"),)


def daemon_plan(
    system: System, config: JailerConfig, config_text: str, notify_socket: str | None
) -> tuple[Operation, ...]:
    """The root of the daemon: read-only but for its own data and /tmp. The machine's network and processes
    stay in its sight, for it serves both."""
    new = str(config.new_root)
    programs = (system.prefix, system.base_prefix, system.sources)
    return (
        plan.PrivateMounts(),
        plan.Tmpfs(new, _ROOT_BYTES, devices=True),
        *_system(new, system),
        plan.Bind("/etc", new + "/etc"),
        plan.Tmpfs(new + "/dev/shm", _DAEMON_TMP_BYTES, 0o1777),
        plan.Tmpfs(new + "/tmp", _DAEMON_TMP_BYTES, 0o1777),
        *([plan.Bind(system.resolver, new + system.resolver)] if system.resolver else []),
        *_outside(programs, system, new),
        *_dev(new),
        plan.Bind("/proc", new + "/proc"),
        plan.Bind(str(config.daemon_dir), f"{new}{config.daemon_dir}", read_only=False),
        plan.Bind(str(config.bundles_dir), f"{new}{config.bundles_dir}", read_only=False),
        *([plan.Bind(notify_socket, new + notify_socket)] if notify_socket else []),
        *_config_file(new, config, config_text),
        *_for_egress(new, config),
        plan.PivotRoot(new),
        plan.SealRoot(),
    )


def _config_file(new: str, config: JailerConfig, text: str) -> tuple[Operation, ...]:
    """A copy, as root's file may be readable by root alone; bound, as its directory may be read-only."""
    copy = new + "/run/roost/edge.toml"
    return (plan.File(copy, text), plan.Bind(copy, f"{new}{config.config_file}"))


def _for_egress(new: str, config: JailerConfig) -> list[Operation]:
    """Read only as they are copied: no secret is ever in the jailer, whose memory its forks inherit."""
    operations: list[Operation] = []
    if config.credentials_dir is not None:
        operations.append(plan.CopyFiles(str(config.credentials_dir), f"{new}{CREDENTIALS}", MAX_CREDENTIAL))
    if config.ca_file is not None:
        operations.append(plan.CopyFile(str(config.ca_file), f"{new}{CA_FILE}", _MAX_CA))
    return operations


def _system(new: str, system: System) -> list[Operation]:
    binds: list[Operation] = [plan.Bind(d, new + d) for d in system.directories]
    return binds + [plan.Link(new + name, to) for name, to in system.links]


def _outside(wanted: tuple[str, ...], system: System, new: str) -> list[Operation]:
    """Binds of those directories that no other bind brings along."""
    shown = list(system.directories)
    binds: list[Operation] = []
    for directory in sorted(set(wanted), key=len):
        if not any(directory == s or directory.startswith(s + "/") for s in shown):
            shown.append(directory)
            binds.append(plan.Bind(directory, new + directory))
    return binds


def _etc(new: str, system: System) -> list[Operation]:
    etc = new + "/etc"
    operations: list[Operation] = [
        plan.File(
            etc + "/passwd",
            f"root:x:0:0:root:/:/usr/sbin/nologin\nagent:x:{AGENT_ID}:{AGENT_ID}:agent:/state:/bin/sh\n",
        ),
        plan.File(etc + "/group", f"root:x:0:\nagent:x:{AGENT_ID}:\n"),
        plan.File(etc + "/hosts", "127.0.0.1 localhost\n::1 localhost\n"),
        plan.File(etc + "/nsswitch.conf", "passwd: files\ngroup: files\nhosts: files\n"),
        plan.File(etc + "/resolv.conf"),
    ]
    operations += [plan.Bind(path, new + path) for path in system.of_etc]
    if system.localtime:
        operations.append(plan.Link(etc + "/localtime", system.localtime))
    return operations


def _dev(new: str) -> list[Operation]:
    operations: list[Operation] = [plan.Device(f"{new}/dev/{name}", *numbers) for name, *numbers in _DEVICES]
    return operations + [plan.Link(f"{new}/dev/{name}", "/proc/self/fd" + to) for name, to in _DEV_LINKS]


def _named_devices(new: str, request: Make, config: JailerConfig) -> list[Operation]:
    """Refused for a name that the node's operator has not given paths to."""
    for name in request.devices:
        if name not in config.devices:
            raise Refused(f"this node has no device {name}", "its edge.toml names those it has, in [devices]")
    return [plan.CopyDevice(path, new + path) for name in request.devices for path in config.devices[name]]


def _proc(new: str) -> list[Operation]:
    proc, empty = new + "/proc", new + "/run/empty"
    operations: list[Operation] = [
        plan.Proc(proc),
        plan.File(empty + "/file"),
        plan.Directory(empty + "/directory"),
    ]
    operations += [plan.ReadOnly(f"{proc}/{name}") for name in _PROC_READ_ONLY]
    for name in _PROC_HIDDEN:
        operations.append(plan.Hide(f"{proc}/{name}", empty + "/file", empty + "/directory"))
    return operations
