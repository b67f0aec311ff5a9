"""The same agent in other sandboxes: each starts Python, imports the framework, and answers one message.

Each is set up to be as strong as it can be without code of ours, near to what a jail of Roost's is, and as
fast as its manual knows how. What they read is in the page cache and byte-compiled.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from bench.escape import SECCOMP, docker_filter
from bench.jails.place import podman_of, runc_of
from bench.jails.starts import AT_ONCE, MESSAGE, REPLY, Failed
from edge_agent.jail.python import base_interpreter
from tests.support.escape import NOBODY

_END_SECONDS = 20.0
_MEMORY, _PROCESSES = 256 << 20, 16  # as in agent.toml
_UIDS = 1_500_000_000  # root's in a container, outside; 65,536 from there on
_LINKS = ("bin", "sbin", "lib", "lib64")
_SERVE = (base_interpreter(), "-I", "-B")
_ids = itertools.count()


@dataclass(slots=True)
class StartedProgram:
    peer: Program
    sandbox: str
    process: asyncio.subprocess.Process
    seconds: float

    async def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()  # which ends the agent
        await self.peer.wait(self.process)

    def pids(self) -> set[int]:
        """Of all that is there for this one."""
        found = {self.process.pid, *(p.pid for p in _children(self.process.pid))}
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if self.sandbox in process.cmdline():
                    found |= {process.pid, *(p.pid for p in _children(process.pid))}
        return found


@dataclass(frozen=True)
class Program:
    """A sandbox that is a program. `command` of a sandbox's id is what to type."""

    name: str
    command: Callable[[str], list[str]]
    options: dict[str, Any] = field(default_factory=dict)

    async def ready(self, starts: int) -> None:
        """It keeps nothing ready."""

    def remark(self) -> str:
        return ""

    async def start(self, message: str = MESSAGE) -> StartedProgram:
        sandbox = f"roost-bench-{os.getpid()}-{next(_ids)}"
        command = self.command(sandbox)
        pipe = asyncio.subprocess.PIPE
        began = time.perf_counter()
        process = await asyncio.create_subprocess_exec(
            *command, stdin=pipe, stdout=pipe, stderr=pipe, **self.options
        )
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(f"{message}\n".encode())
            line = await process.stdout.readline()
            seconds = time.perf_counter() - began
            await _check(process, line)
        except BaseException:
            with suppress(ProcessLookupError):
                process.kill()
            await self.wait(process)
            raise
        return StartedProgram(self, sandbox, process, seconds)

    async def wait(self, process: asyncio.subprocess.Process) -> None:
        try:
            async with asyncio.timeout(_END_SECONDS):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


async def _check(process: asyncio.subprocess.Process, line: bytes) -> None:
    if line.decode().rstrip() != REPLY:
        assert process.stderr is not None
        raise Failed((await process.stderr.read()).decode()[-300:] or f"it said {line!r}")


def _children(pid: int) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []


def bwrap(agent: Path, directory: Path) -> Program:
    """Unprivileged, as flatpak does it."""
    options = ["--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent", "--new-session"]
    options += ["--clearenv", "--cap-drop", "ALL", "--ro-bind", "/usr", "/usr", "--proc", "/proc"]
    options += ["--dev", "/dev", "--tmpfs", "/tmp", "--ro-bind", str(agent), "/agent", "--chdir", "/agent"]
    for name in _LINKS:
        options += ["--symlink", f"usr/{name}", f"/{name}"]
    as_nobody = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
    command = ["bwrap", *options, *_SERVE, "/agent/serve.py"]
    return Program("bwrap", lambda sandbox: command, as_nobody)


def runc(agent: Path, directory: Path) -> Program:
    """As podman sets it up for `podman` below, without podman."""
    rootfs = _rootfs(directory / "runc")
    subprocess.run(["runc", "spec"], cwd=rootfs.parent, check=True, capture_output=True)
    config = rootfs.parent / "config.json"
    config.write_text(json.dumps(_container(json.loads(config.read_text()), agent)))
    run = runc_of(directory, "run", "--no-new-keyring", "--bundle", str(rootfs.parent))
    return Program("runc", lambda sandbox: [*run, sandbox])


def _container(spec: dict[str, Any], agent: Path) -> dict[str, Any]:
    process, linux = spec["process"], spec["linux"]
    process |= {"terminal": False, "user": {"uid": 1000, "gid": 1000}, "cwd": "/agent", "capabilities": {}}
    process["args"] = [*_SERVE, "/agent/serve.py"]
    read_only = ["rbind", "ro", "nosuid"]
    spec["mounts"] += [
        {"destination": "/usr", "type": "bind", "source": "/usr", "options": read_only},
        {"destination": "/agent", "type": "bind", "source": str(agent), "options": read_only},
        {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "nodev"]},
    ]
    ids = [{"containerID": 0, "hostID": _UIDS, "size": 65_536}]
    linux |= {"uidMappings": ids, "gidMappings": ids, "seccomp": docker_filter()}
    linux["namespaces"].append({"type": "user"})
    linux["resources"] |= {"memory": {"limit": _MEMORY}, "pids": {"limit": _PROCESSES}}
    return spec


def podman(agent: Path, directory: Path) -> Program:
    """From a directory, not an image; without log, events, health checks and hosts file."""
    rootfs = _rootfs(directory / "podman")
    run = podman_of(
        directory, "run", "--rm", "--interactive", "--network=none", "--read-only", "--cap-drop=all"
    )
    run += ["--security-opt=no-new-privileges", f"--uidmap=0:{_UIDS}:65536", "--user=1000:1000"]
    run += ["--ulimit=nofile=20000:20000", "--ulimit=nproc=4096:4096", "--log-driver=none"]
    run += ["--no-healthcheck", "--no-hosts", f"--memory={_MEMORY}", f"--pids-limit={_PROCESSES}"]
    run += ["--volume=/usr:/usr:ro", f"--volume={agent}:/agent:ro"]

    return Program(
        "podman",
        lambda sandbox: [*run, f"--name={sandbox}", "--rootfs", str(rootfs), *_SERVE, "/agent/serve.py"],
    )


def _rootfs(directory: Path) -> Path:
    """A root directory that takes its system from the host's /usr."""
    rootfs = directory / "rootfs"
    for name in ("proc", "sys", "dev", "etc", "run", "tmp", "usr", "agent", "var/tmp"):
        (rootfs / name).mkdir(parents=True)
    for name in _LINKS:
        (rootfs / name).symlink_to(f"usr/{name}")
    subprocess.run(["chown", "-R", f"{_UIDS}:{_UIDS}", str(rootfs)], check=True)
    return rootfs


@dataclass(slots=True)
class StartedSandlock:
    peer: Sandlock
    process: Any
    seconds: float

    async def end(self) -> None:
        await self.peer.in_thread(lambda: self.process.wait(_END_SECONDS))

    def pids(self) -> set[int]:
        return {self.process.pid, *(p.pid for p in _children(self.process.pid))}


class Sandlock:
    """As its README does it, from a process that has its library loaded. It has no namespaces, and runs as
    whoever calls: here root, whom its own filter and Landlock hold."""

    name = "sandlock"

    def __init__(self, agent: Path) -> None:
        self._agent = str(agent)
        self._threads = ThreadPoolExecutor(2 * AT_ONCE)
        self.in_thread = lambda work: asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def ready(self, starts: int) -> None:
        """It keeps nothing ready."""

    def remark(self) -> str:
        return ""

    async def start(self, message: str = MESSAGE) -> StartedSandlock:
        return await self.in_thread(lambda: self._start(message))

    def _start(self, message: str) -> StartedSandlock:
        from sandlock import Sandbox
        from sandlock.sandbox import StdioMode

        began = time.perf_counter()
        sandbox = Sandbox(
            fs_readable=["/usr", "/lib", "/lib64", "/bin", "/etc", "/proc", "/dev", self._agent],
            clean_env=True,
            cwd=self._agent,
            max_memory=_MEMORY,
            max_processes=_PROCESSES,
        )
        serve = [*_SERVE, f"{self._agent}/serve.py"]
        try:
            process = sandbox.popen(serve, stdin=StdioMode.PIPED, stdout=StdioMode.PIPED)
        except RuntimeError as error:
            raise Failed(str(error)) from error
        process.stdin.write(f"{message}\n".encode())
        line = process.stdout.readline()
        seconds = time.perf_counter() - began
        if line.decode().rstrip() != REPLY:
            process.kill()
            process.wait(_END_SECONDS)
            raise Failed(f"it said {line!r}")
        return StartedSandlock(self, process, seconds)


Peer = Program | Sandlock


def peers(agent: Path, directory: Path) -> tuple[list[Peer], dict[str, str]]:
    """Those that are installed, and why others are left out."""
    found: list[Peer] = []
    missing: dict[str, str] = {}
    for make in (bwrap, runc, podman):
        name = make.__name__
        if shutil.which(name) is None:
            missing[name] = "it is not installed"
        elif name != "bwrap" and not SECCOMP.exists():
            missing[name] = f"{SECCOMP}, the usual filter, is missing"
        else:
            found.append(make(agent, directory))
    try:
        import sandlock  # noqa: F401
    except ImportError:
        missing["sandlock"] = "it is not installed (pip install sandlock)"
    else:
        found.append(Sandlock(agent))
    return found, missing
