"""Starts the daemon: a child with its own uid, no capabilities, and a root in which only its data can be
written."""

from __future__ import annotations

import logging
import os
import signal
import time
from dataclasses import dataclass
from typing import NoReturn, Protocol

from edge_agent.jail import kernel, roots
from edge_agent.jail.config import JailerConfig
from edge_agent.jail.operations import Do, carry_out
from edge_agent.jail.protocol import Refused
from edge_agent.jail.wire import Wire, pair

log = logging.getLogger(__name__)

FD_VARIABLE = "ROOST_JAILER_FD"
_PASSED_ON = (
    "LANG",
    "LC_ALL",
    "TZ",
    "NOTIFY_SOCKET",
    "PYTHONUNBUFFERED",
    "PYTHONFAULTHANDLER",
    "ROOST_FAILPOINTS",
)


@dataclass(slots=True)
class DaemonProcess:
    """`started` is on the monotonic clock."""

    pid: int
    wire: Wire
    started: float
    asked_to_end: bool = False


class DaemonStarter(Protocol):
    def start(self) -> DaemonProcess:
        """OSError if there can be no process; a daemon that fails later says so by ending."""
        ...


class DaemonStarterAsRoot:
    """Runs `argv`. Must be called by the jailer's one thread."""

    def __init__(self, config: JailerConfig, system: roots.System, argv: tuple[str, ...]) -> None:
        self._config = config
        self._system = system
        self._argv = argv

    def start(self) -> DaemonProcess:
        ours, theirs = pair()
        parent = os.getpid()
        try:
            pid = os.fork()
            if pid == 0:
                self._child(theirs.fileno(), parent)
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        return DaemonProcess(pid, Wire(ours), time.monotonic())

    def _child(self, fd: int, parent: int) -> NoReturn:
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
                signal.signal(number, signal.SIG_DFL)
            os.closerange(3, fd)
            os.closerange(fd + 1, 1 << 20)
            self._enter_root()
            self._drop_privileges()
            kernel.die_with_parent()
            if os.getppid() != parent:  # it died before we asked to die with it
                os._exit(1)
            os.set_inheritable(fd, True)
            os.execve(self._argv[0], self._argv, self._environment(fd))
        except Refused as refused:
            log.error("the daemon's root can't be built: %s (%s)", refused.message, refused.hint)  # noqa: TRY400
        except BaseException:
            log.exception("the daemon can't be started")
        finally:
            os._exit(1)

    def _enter_root(self) -> None:
        notify = os.environ.get("NOTIFY_SOCKET", "")
        plan = roots.daemon_plan(
            self._system,
            self._config,
            self._config.config_file.read_text(),
            notify if notify.startswith("/") and os.path.exists(notify) else None,
        )
        carry_out((Do("enter a mount namespace", lambda: kernel.unshare(kernel.CLONE_NEWNS)), *plan))
        os.chdir(self._system.sources)

    def _drop_privileges(self) -> None:
        uid, gid = self._config.daemon_uid, self._config.daemon_gid
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        kernel.keep_capabilities((kernel.CAP_SETUID,))
        os.setresuid(uid, uid, uid)
        kernel.drop_capabilities()
        kernel.no_new_privs()

    def _environment(self, fd: int) -> dict[str, str]:
        passed = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        return {
            **passed,
            "PATH": f"{self._system.prefix}/bin:/usr/local/bin:/usr/bin:/bin",
            "HOME": str(self._config.daemon_dir),
            "TMPDIR": "/tmp",
            "PYTHONPATH": self._system.sources,
            "PYTHONDONTWRITEBYTECODE": "1",
            "MALLOC_ARENA_MAX": "2",  # each thread would have one of its own, and give little back
            FD_VARIABLE: str(fd),
        }
