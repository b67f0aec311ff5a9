"""Puts the jailer together, and runs it."""

from __future__ import annotations

import fcntl
import logging
import os
import resource
import time

from edge_agent.jail import cgroups, file_service, seccomp, spawn, spawn_shell, spawn_zygote
from edge_agent.jail.cgroups.base import Cgroups
from edge_agent.jail.config import JailerConfig
from edge_agent.jail.daemon_process import DaemonStarterAsRoot
from edge_agent.jail.directories import Directories
from edge_agent.jail.jailer import Jailer
from edge_agent.jail.loop import Loop
from edge_agent.jail.protocol import Refused
from edge_agent.jail.roots import System
from edge_agent.jail.wright import Job, Tools, Wright

log = logging.getLogger(__name__)

_LOCK_SECONDS = 5.0
_DESCRIPTORS = 1 << 16  # as many as the unit of systemd allows
_JOBS: dict[bytes, Job] = {
    spawn.MAKE_INIT: spawn.make_init,
    spawn_shell.MAKE_SHELL: spawn_shell.make_shell,
    file_service.SERVE_FILES: file_service.serve_files,
    spawn_zygote.MAKE_ZYGOTE: spawn_zygote.make_zygote,
}


def run(config: JailerConfig, daemon_argv: tuple[str, ...]) -> None:
    """Until SIGTERM or SIGINT. Refused if it can't start."""
    directories = Directories(config)
    # Now, so that a machine for which there are none is refused, and forks inherit them.
    seccomp.agent_filter()
    seccomp.zygote_filter()
    lock, groups = _take_over(config)
    raise_descriptors()
    try:
        trash = directories.prepare()
    except OSError as error:
        raise Refused(f"the node can't prepare its directories: {error}") from error
    _tell_limits(groups, directories)
    system = System.survey()
    starter = DaemonStarterAsRoot(config, system, daemon_argv)
    loop = Loop()
    wright = Wright(Tools(config, system, groups, os.getpid()), _JOBS, loop.on_child)
    jailer = Jailer(config, wright, groups, directories, starter, loop)
    try:
        jailer.run(trash)
    finally:
        wright.close()
        groups.close()
        os.close(lock)


def raise_descriptors() -> None:
    """Thousands of jails take some each, here and in the daemon, which inherits the limit. The usual soft one
    is low for the sake of programs that call select()."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, _DESCRIPTORS)), hard))


def _tell_limits(groups: Cgroups, directories: Directories) -> None:
    """What this machine can't do should not be found out when it is needed."""
    if directories.quota is not None:
        log.info("the size of /state is limited by the kernel: user quotas")
    else:
        log.info("the size of /state is measured, not limited: data_dir's file system has no user quotas")
    if not groups.limits_io:
        log.info("disk_read and disk_write are not in force: no such control group, or no single disk")


def clean(config: JailerConfig) -> None:
    """Removes what a node that was killed has left on this machine, but its data. Refused if it runs."""
    lock, groups = _take_over(config)
    groups.close()
    os.close(lock)


def _take_over(config: JailerConfig) -> tuple[int, Cgroups]:
    """The node's lock, and its control groups, empty: whatever a predecessor left in them has ended."""
    if os.geteuid() != 0:
        raise Refused("edge_agent makes jails, for which it must be root", "start it with sudo or systemd")
    os.umask(0o022)
    try:
        lock = _lock(config)
        groups = cgroups.detect(config.data_dir)
        groups.sweep()
    except OSError as error:
        raise Refused(f"the node can't prepare its control groups: {error}") from error
    return lock, groups


def _lock(config: JailerConfig) -> int:
    """One node a data directory. A predecessor's children may hold it for a moment after its death."""
    config.data_dir.mkdir(parents=True, exist_ok=True)
    fd = os.open(config.data_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise Refused(
                    f"another node runs on {config.data_dir}",
                    "stop it, or give this one a data_dir of its own",
                ) from None
            time.sleep(0.05)
