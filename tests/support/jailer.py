"""A real jailer for tests, in directories of its own. Root only.

async with running_jailer() as jailer:
    jailer.bundle("v1", {"agent.py": "..."})
    jail = await jailer.jails.make(spec("a", python("...")))
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import psutil
import pytest

from edge_agent.jail.api import Jail, JailSpec, Zygote
from edge_agent.jail.cgroups import parent_name
from edge_agent.jail.client import JailerClient
from edge_agent.jail.python import base_interpreter, zygote_argv
from shared.resources import Resources
from tests.support.process import Process
from tests.support.run_jailer import BROKEN, LEVEL


def is_root() -> bool:
    return os.geteuid() == 0


needs_root = pytest.mark.skipif(not is_root(), reason="jails need root")

LIMITS = Resources(memory_bytes=128 << 20, cpu_millis=1000, pids=32)
BUNDLE = "v1"
FILE_SERVICE = "roost-files"  # its name among the jailer's children
_START_SECONDS = 15.0

# What small agents of tests need to talk: recv() and send() of bytes, recv() None at the end.
_TALK = """
import os, socket, struct
_node = socket.socket(fileno=3)
def _exactly(n):
    data = b""
    while len(data) < n:
        more = _node.recv(n - len(data))
        if not more: raise SystemExit(0)
        data += more
    return data
def recv(): return _exactly(struct.unpack(">I", _exactly(4))[0])
def send(data): _node.sendall(struct.pack(">I", len(data)) + data)
"""
ECHO = "while True: send(recv())"


def python(code: str) -> tuple[str, ...]:
    """An agent of `code`, which may call recv() and send()."""
    return (base_interpreter(), "-I", "-B", "-c", _TALK + code)


# An agent's module that runs `code` as `python` does, and can be forked. `top` is for its import.
_FORKED = """
from roost import Agent
{top}
class Raw(Agent):
    def run(self):
        exec(compile({code!r}, "raw", "exec"), {{"top": globals()}})
agent = Raw()
agent.turn(lambda turn: "")
"""
FORKED_BUNDLE = {"hello.txt", "raw.py"}


def spec(jail_id: str, argv: tuple[str, ...], limits: Resources = LIMITS, **env: str) -> JailSpec:
    return JailSpec(jail_id, BUNDLE, argv, env, limits)


class RunningJailer:
    """`jails` is the client; after the daemon was restarted, `reconnect` makes it a new one."""

    def __init__(
        self,
        directory: Path,
        config: str = "",
        image: Path | None = None,
        level: str = "INFO",
        broken: str = "",
    ) -> None:
        """`config`: more of its edge.toml. `image`: of a file system that its data is on (`quota_disk`).
        `level`: of its log. `broken`: the step that inits of forked jails fail at."""
        self.data_dir = directory / "data"
        self.daemon_pid = 0
        # At random, so that test runs at the same time do not share uids.
        self._uids = range(base := 1_000_000_000 + secrets.randbelow(10_000) * 65_536, base + 65_536)
        self.jails: JailerClient
        self.config = directory / "edge.toml"
        name = f"roost-test-{secrets.token_hex(8)}"
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind("\0" + name)
        self._listener.listen()
        self._listener.setblocking(False)
        argv = (str(self.config), sys.executable, "-m", "tests.support.jail_daemon", name)
        module = "quota_disk" if image else "run_jailer"
        argv = (*([str(image)] if image else []), *argv)
        self.process = Process(
            f"tests.support.{module}", argv, directory / "log", {LEVEL: level, BROKEN: broken}
        )
        self.config.write_text(
            f'node = "test"\ndata_dir = "{self.data_dir}"\ncoordinators = ["127.0.0.1:1"]\n'
            f'[jailer]\nuid_base = {self._uids.start}\nstop_grace = "5s"\n{config}'
        )

    async def start(self) -> None:
        await self.process.start()
        await self.reconnect()
        self.bundle(BUNDLE, {"hello.txt": "hello"})

    async def reconnect(self) -> JailerClient:
        """Waits for the (next) daemon, and takes its socket."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_START_SECONDS):
                connection, _ = await loop.sock_accept(self._listener)
        except TimeoutError:
            raise AssertionError(f"no daemon came:\n{self.log()[-3000:]}") from None
        with connection:
            connection.setblocking(True)
            data, fds, _, _ = socket.recv_fds(connection, 64, 1, socket.MSG_CMSG_CLOEXEC)
        self.daemon_pid = int(data)
        self.jailer_socket = socket.socket(fileno=fds[0])
        self.jails = JailerClient(self.jailer_socket)
        return self.jails

    def bundle(self, version: str, files: dict[str, str]) -> None:
        directory = self.data_dir / "bundles" / version
        for name, text in files.items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_text(text)

    async def zygote(self, version: str, code: str, top: str = "") -> Zygote:
        """One that has imported a module of version `version`, which runs `code` in each jail."""
        return await self.jails.zygote(self.zygote_spec(f"zygote-{version}", version, code, top))

    def zygote_spec(self, jail_id: str, version: str, code: str, top: str = "") -> JailSpec:
        """Of a zygote, whose module is put in place."""
        self.bundle(version, {"hello.txt": "hello", "raw.py": _FORKED.format(code=_TALK + code, top=top)})
        return JailSpec(jail_id, version, zygote_argv("raw:agent"), {}, LIMITS)

    async def forked(self, jail_id: str, zygote: Zygote, **env: str) -> Jail:
        """A jail whose agent was forked from `zygote`."""
        version = zygote.jail_id.removeprefix("zygote-")
        jail = await self.jails.make(JailSpec(jail_id, version, ("/none",), env, LIMITS, zygote.jail_id))
        await jail.start()
        return jail

    async def started(self, way: str, jail_id: str, code: str, **env: str) -> Jail:
        """A jail in which `code` runs, by `way` "exec" or "zygote"."""
        if way == "zygote":
            version = f"v-{hashlib.sha256(code.encode()).hexdigest()[:16]}"
            return await self.forked(jail_id, await self.zygote(version, code), **env)
        jail = await self.jails.make(spec(jail_id, python(code), **env))
        await jail.start()
        return jail

    def log(self) -> str:
        return self.process.log()

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    def cgroups(self) -> list[Path]:
        """The directories of jails in all control group trees."""
        return [child for p in self._cgroup_parents() for child in p.iterdir() if child.is_dir()]

    def members(self, jail_id: str) -> list[int]:
        """The host's pids of all in the control groups of a jail or zygote."""
        found: set[int] = set()
        for group in self.cgroups():
            if group.name == jail_id:
                for procs in (group / "cgroup.procs", group / "agent" / "cgroup.procs"):
                    with suppress(OSError):  # there is none, or it has just ended
                        found.update(map(int, procs.read_text().split()))
        return sorted(found)

    def _cgroup_parents(self) -> list[Path]:
        root, name = Path("/sys/fs/cgroup"), parent_name(self.data_dir)
        return [p for d in (root, *root.iterdir()) if (p := d / name).is_dir()]

    def inits(self) -> list[int]:
        """The host's pids of the jails' inits: the jailer's children in another pid namespace."""
        mine = os.readlink("/proc/self/ns/pid")
        children = psutil.Process(self.process.pid).children()
        return [
            child.pid
            for child in children
            if _pid_namespace(child.pid) not in (None, mine) and _name(child) != FILE_SERVICE
        ]

    def child_named(self, name: str) -> psutil.Process | None:
        children = psutil.Process(self.process.pid).children()
        return next((child for child in children if _name(child) == name), None)

    def shells(self) -> list[int]:
        """Of those, the ones that no jail has yet: they have a zygote's uid for the time being."""
        return [pid for pid in self.inits() if _waits(pid)]

    def leftovers(self) -> list[str]:
        """What a jailer that has ended left on this machine, but for its data directory."""
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
        return [
            *(str(parent) for parent in self._cgroup_parents()),
            *(f"process {pid}" for pid in {*self.jailed(), *self.forked_only()}),
            *(f"mount {line}" for line in mounts if str(self.data_dir) in line),
        ]

    def forked_only(self) -> list[int]:
        """It and those that it forked and that have executed nothing since: inits, in whatever state."""
        return [p.pid for p in psutil.process_iter() if alive(p.pid) and str(self.config) in _command(p)]

    def jailed(self) -> list[int]:
        """The host's pids of all that runs in its jails: whoever has one of its uids."""
        return [p.pid for p in psutil.process_iter() if alive(p.pid) and _uid(p.pid) in self._uids]

    async def close(self) -> None:
        if hasattr(self, "jails"):
            self.jails.close()
        self._listener.close()
        if self.process.running:
            await self.process.stop()


def alive(pid: int) -> bool:
    """Does it run? A zombie, whose new parent has not yet reaped it, does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _uid(pid: int) -> int:
    try:
        return psutil.Process(pid).uids().real
    except psutil.NoSuchProcess:
        return -1


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.NoSuchProcess:
        return ""


def _waits(pid: int) -> bool:
    try:
        uids = psutil.Process(pid).uids()
    except psutil.NoSuchProcess:  # it ended just now
        return False
    return bool(uids.real == 0 != uids.effective)


def _pid_namespace(pid: int) -> str | None:
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return None


def _new_directory() -> Path:
    directory = Path(tempfile.mkdtemp(prefix="roost-jailer-"))
    directory.chmod(0o711)  # tests act as the agent on its state
    return directory


@asynccontextmanager
async def running_jailer(
    config: str = "", image: Path | None = None, level: str = "INFO", broken: str = ""
) -> AsyncIterator[RunningJailer]:
    """Stopped at the end, with all of its jails; its log is printed for a test that fails."""
    directory = _new_directory()
    jailer = RunningJailer(directory, config, image, level, broken)
    try:
        await jailer.start()
        yield jailer
    finally:
        await jailer.close()
        print(jailer.log())
        left = jailer.leftovers()
        shutil.rmtree(directory)
        assert not left, left
