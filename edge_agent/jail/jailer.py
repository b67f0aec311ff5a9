"""The jailer: root, one thread, no network. Starts the daemon, does what it asks, and outlives it.

What must hold: no request harms a jail that it does not name, or anything outside of the node's directories
and control groups; the jailer goes on whatever the daemon sends or however it ends; an answer reaches the
daemon that asked, or nobody: its successor counts its requests from 1 again, and would take it for its own.
"""

from __future__ import annotations

import itertools
import logging
import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, assert_never

from edge_agent.jail import kernel, protocol, quota
from edge_agent.jail.cgroups.base import Cgroups
from edge_agent.jail.config import JailerConfig
from edge_agent.jail.daemon_process import DaemonProcess, DaemonStarter
from edge_agent.jail.directories import Directories
from edge_agent.jail.keeper import Keeper
from edge_agent.jail.loop import Loop, Timer
from edge_agent.jail.protocol import Refused
from edge_agent.jail.wire import Body, Closed, Garbage, close_all
from edge_agent.jail.wright import Wright

log = logging.getLogger(__name__)

_PAGE = 1000  # ids of directories in one answer
_BACKOFF_FIRST, _BACKOFF_MOST = 0.1, 10.0
_LAST_WORDS = 3.0  # seconds from the end of a daemon's socket to its own
_LIVED_WELL = 30.0  # seconds after which a daemon's end counts as the first one


class Jailer:
    def __init__(
        self,
        config: JailerConfig,
        wright: Wright,
        cgroups: Cgroups,
        directories: Directories,
        starter: DaemonStarter,
        loop: Loop,
    ) -> None:
        self._config = config
        self._directories = directories
        self._starter = starter
        self._loop = loop
        self._keeper = Keeper(config, wright, cgroups, directories, loop, self._answer, self._tell)
        self._daemon: DaemonProcess | None = None
        self._serials = itertools.count(1)
        self._asked: dict[int, int] = {}  # our number of a request: this daemon's own
        self._backoff = _BACKOFF_FIRST
        self._restart: Timer | None = None
        self._stopping = False

    def run(self, trash: list[Path]) -> None:
        """Until SIGTERM or SIGINT, and all is cleaned up. `trash`: what a predecessor began to remove."""
        kernel.adopt_orphans()  # agents that a zygote forked
        self._loop.on_signal(signal.SIGTERM, self._stop)
        self._loop.on_signal(signal.SIGINT, self._stop)
        self._loop.on_signal(signal.SIGHUP, self._reload)
        for path in trash:
            self._remove_tree(path, None)
        if self._directories.quota is None:
            self._watch_disk(quota.DiskWatch(*quota.free(self._config.jails_dir)))
        self._start_daemon()
        try:
            self._loop.run()
        finally:
            self._keeper.close()

    def _watch_disk(self, watch: quota.DiskWatch) -> None:
        with suppress(OSError):  # the disk fails: those who use it will say so
            if watch.shrank(*quota.free(self._config.jails_dir)):
                self._keeper.measure()
        self._loop.after(quota.WATCH_SECONDS, lambda: self._watch_disk(watch))

    # --- the daemon --------------------------------------------------------------------------------------

    def _start_daemon(self) -> None:
        self._restart = None
        try:
            daemon = self._starter.start()
        except OSError as error:
            log.error("the daemon can't be forked: %s; trying again", error)  # noqa: TRY400
            self._start_later()
            return
        self._daemon = daemon
        self._loop.watch(daemon.wire, lambda: self._hear(daemon))
        self._loop.on_child(daemon.pid, lambda code: self._daemon_ended(daemon, code))

    def _daemon_ended(self, daemon: DaemonProcess, code: int) -> None:
        self._loop.unwatch(daemon.wire)
        daemon.wire.close()
        self._daemon = None
        self._asked.clear()
        self._keeper.end_daemons_own()
        if self._stopping:
            self._keeper.kill_all(self._loop.stop)
            return
        if daemon.asked_to_end:
            self._backoff = 0.0
        elif time.monotonic() - daemon.started > _LIVED_WELL:
            self._backoff = _BACKOFF_FIRST
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        log.warning("the daemon ended with %s; it is started again in %.1f s", how, self._backoff)
        self._start_later()

    def _start_later(self) -> None:
        self._restart = self._loop.after(self._backoff, self._start_daemon)
        self._backoff = min(_BACKOFF_MOST, max(_BACKOFF_FIRST, self._backoff * 2))

    def _end_daemon(self, daemon: DaemonProcess) -> None:
        daemon.asked_to_end = True
        os.kill(daemon.pid, signal.SIGTERM)
        self._loop.after(self._config.stop_grace, lambda: self._lose_patience(daemon))

    def _lose_patience(self, daemon: DaemonProcess) -> None:
        if self._daemon is daemon:
            log.warning("the daemon did not end in %g s and is killed", self._config.stop_grace)
            os.kill(daemon.pid, signal.SIGKILL)

    def _reload(self) -> None:
        if self._daemon is not None and not self._stopping:
            self._end_daemon(self._daemon)

    def _stop(self) -> None:
        if self._stopping:
            return
        self._stopping = True
        if self._restart is not None:
            self._restart.cancel()
        if self._daemon is not None:
            self._end_daemon(self._daemon)
        else:
            self._keeper.kill_all(self._loop.stop)

    # --- its requests --------------------------------------------------------------------------------------

    def _hear(self, daemon: DaemonProcess) -> None:
        try:
            daemon.wire.flush()
            if daemon.wire.wants_write:
                return
            for frame in daemon.wire.receive():
                self._take(frame.body, frame.fds)
                frame.close()
        except Closed:
            self._loop.unwatch(daemon.wire)  # it ends; how, its exit code will tell
            self._loop.after(_LAST_WORDS, lambda: self._break_with(daemon, "closed its socket but goes on"))
        except Garbage as error:
            self._loop.unwatch(daemon.wire)
            self._break_with(daemon, f"sent {error}")

    def _break_with(self, daemon: DaemonProcess, why: str) -> None:
        """A daemon that can't be talked to is of no use: the next one adopts its jails."""
        if self._daemon is daemon and not daemon.asked_to_end:
            log.warning("the daemon %s, and is killed", why)
            os.kill(daemon.pid, signal.SIGKILL)

    def _take(self, body: Body, fds: tuple[int, ...]) -> None:
        asked = body.pop("id", None)
        if not isinstance(asked, int):
            log.warning("the daemon sent a request without an id: %.200r", body)
            return
        request_id = next(self._serials)
        self._asked[request_id] = asked
        try:
            self._do(request_id, protocol.decode(body), fds)
        except Refused as refused:
            self._answer(request_id, {"error": refused.body()}, ())
        except OSError as error:
            message = f"{body.get('do')} of {body.get('jail_id')}: {error}"
            self._answer(request_id, {"error": Refused(message).body()}, ())
        except Closed:
            self._answer(request_id, {"error": Refused("the jail ended just now").body()}, ())

    def _do(self, request_id: int, request: protocol.Request, fds: tuple[int, ...]) -> None:
        """The descriptors stay the caller's."""
        match request:
            case protocol.Make():
                if self._stopping:
                    raise Refused("this node is stopping")
                self._keeper.make(request_id, request)
            case protocol.List():
                self._ok(request_id, jail_ids=self._keeper.jail_ids())
            case protocol.Directories(after):
                self._ok(request_id, jail_ids=self._directories.listing(after, _PAGE))
            case protocol.Discard(jail_id):
                self._discard(request_id, jail_id)
            case (
                protocol.Attach()
                | protocol.Fork()
                | protocol.Measure()
                | protocol.Resize()
                | protocol.Listen()
                | protocol.Connect()
                | protocol.Kill()
            ):
                self._keeper.of_jail(request_id, request)
            case protocol.Guard() | protocol.Release():
                self._keeper.of_file(request_id, request, fds)
            case _:
                assert_never(request)

    def _discard(self, request_id: int, jail_id: str) -> None:
        if self._keeper.needs_directory(jail_id):
            raise Refused(f"jail {jail_id} runs, so its directory stays", "kill it first")
        trash = self._directories.trash(jail_id)
        if trash is None:
            self._ok(request_id)
        else:
            self._remove_tree(trash, request_id)

    def _remove_tree(self, trash: Path, request_id: int | None) -> None:
        """In a process of its own: a tree can be large, and rm is made for hostile ones."""
        slot = self._directories.slot_in(trash)
        argv = ["rm", "-rf", "--one-file-system", "--", str(trash)]
        pid = os.posix_spawnp("rm", argv, {"PATH": os.defpath})

        def removed(code: int) -> None:
            gone = self._directories.removed(trash, slot)
            if not gone:
                log.error("%s can't be removed (rm: %d); the next start tries again", trash, code)
            if request_id is not None:
                problem = Refused(f"the directory of {trash.name} can't be removed", "see the node's log")
                self._answer(request_id, {"ok": {}} if gone else {"error": problem.body()}, ())

        self._loop.on_child(pid, removed)

    def _ok(self, request_id: int, **fields: Any) -> None:
        self._answer(request_id, {"ok": fields}, ())

    def _answer(self, request_id: int, body: dict[str, Any], fds: tuple[int, ...]) -> None:
        asked = self._asked.pop(request_id, None)
        if asked is None:
            close_all(fds)
        else:
            self._send({"id": asked, **body}, fds)

    def _tell(self, body: dict[str, Any]) -> None:
        self._send(body, ())

    def _send(self, body: dict[str, Any], fds: tuple[int, ...]) -> None:
        """To the daemon that there is now. One that is gone learns the state when its successor lists."""
        if self._daemon is None:
            close_all(fds)
            return
        try:
            self._daemon.wire.send(body, fds)
            self._loop.refresh(self._daemon.wire)
        except Closed:
            pass  # its end is noticed where it is read, or reaped
