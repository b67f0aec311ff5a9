"""`agent.toml`: how to start an agent, what it may use, and how long things may take."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum

from shared import config
from shared.config import Duration, Size
from shared.errors import Reason, RoostError
from shared.names import NAME_RULE, is_name
from shared.network_policy import PROXY_PORT, NetworkSection
from shared.resources import Disk, Resources

FILE_NAME = "agent.toml"
_MOST_DEVICES = 16
_LEAST_DISK, _MOST_DISK = 1 << 20, 4 << 30  # bytes
_LEAST_RATE = 64 << 10  # bytes a second: with less, not even starting ends
_ENTRY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_PATH = re.compile(r"/[!-~]{0,1023}")  # as it stands in a request line
_MAX_COMMAND = 64


@dataclass(frozen=True, slots=True)
class AgentSection:
    name: str
    description: str = ""

    def __post_init__(self) -> None:
        if not is_name(self.name):
            raise ValueError(f"name {self.name!r}: {NAME_RULE}")


class Start(StrEnum):
    """How an instance's process comes to be: by the fastest way there is, or by none faster than this."""

    AUTO = "auto"
    PARKED = "parked"
    ZYGOTE = "zygote"
    EXEC = "exec"


@dataclass(frozen=True, slots=True)
class RunSection:
    """Either `entry`, `module:object`, the `roost.Agent` to run, or `command`, any program. With a `port` the
    program serves HTTP there; without one it speaks docs/agent-protocol.md."""

    entry: str = ""
    command: tuple[str, ...] = ()
    port: int = 0
    path: str = "/"
    start: Start = Start.AUTO
    start_timeout: Duration = Duration(10.0)
    turn_timeout: Duration = Duration(60.0)
    idle_timeout: Duration = Duration(300.0)

    def __post_init__(self) -> None:
        if bool(self.entry) == bool(self.command):
            raise ValueError('write either entry, like "chef:agent", or command, like ["node", "server.js"]')
        if self.entry and not _ENTRY.fullmatch(self.entry):
            raise ValueError(f'entry {self.entry!r}: write module:object, like "chef:agent"')
        if self.command:
            self._check_command()
        self._check_http()
        for name in ("start_timeout", "turn_timeout", "idle_timeout"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be more than 0")

    def _check_command(self) -> None:
        if len(self.command) > _MAX_COMMAND or any("\0" in part for part in self.command):
            raise ValueError(f"command has at most {_MAX_COMMAND} parts, and no NUL")
        program = self.command[0]
        if not program or program.startswith("-") or "=" in program:
            raise ValueError(
                f'command {program!r}: begin with a program, like "node", "/usr/bin/perl" or "./server"'
            )
        if self.start not in (Start.AUTO, Start.EXEC):
            raise ValueError(
                f'start = "{self.start}" needs an entry: a command is always executed; write "exec"'
            )

    def _check_http(self) -> None:
        if self.port == 0:
            if self.path != "/":
                raise ValueError("path is of no use without port")
            return
        if not self.command:
            raise ValueError("port needs a command: an entry gets its turns without HTTP")
        if not 1024 <= self.port <= 65_535:
            raise ValueError(f"port {self.port}: use 1024 to 65535; an agent may not listen at others")
        if not _PATH.fullmatch(self.path):
            raise ValueError(f"path {self.path!r}: begin with /, and use printable ASCII without spaces")


@dataclass(frozen=True, slots=True)
class ResourcesSection:
    memory: Size = Size(128 << 20)
    cpu: float = 0.5
    pids: int = 64
    disk: Size = Size(1 << 30)
    disk_read: Size = Size(0)
    disk_write: Size = Size(0)
    devices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_resources(self)
        if not _LEAST_DISK <= self.disk <= _MOST_DISK:
            raise ValueError("disk must be from 1M to 4G")
        for name in ("disk_read", "disk_write"):
            if 0 < getattr(self, name) < _LEAST_RATE:
                raise ValueError(f"{name} is in bytes a second, and at least 64K; leave it out for no limit")
        for name in self.devices:
            if not is_name(name):
                raise ValueError(f"devices: {name!r} is not what a node can call a device: {NAME_RULE}")
        if len(set(self.devices)) < len(self.devices) or len(self.devices) > _MOST_DEVICES:
            raise ValueError(f"devices: name at most {_MOST_DEVICES}, each once")


@dataclass(frozen=True, slots=True)
class TasksSection:
    """The most that the tasks of one instance may use; what a task does not ask for is this, too."""

    at_once: int = 4
    memory: Size = Size(128 << 20)
    cpu: float = 0.5
    pids: int = 64
    timeout: Duration = Duration(30.0)

    def __post_init__(self) -> None:
        if not 0 <= self.at_once <= 32:
            raise ValueError("at_once must be between 0 (no tasks) and 32")
        _check_resources(self)
        if self.timeout <= 0:
            raise ValueError("timeout must be more than 0")


def _check_resources(section: ResourcesSection | TasksSection) -> None:
    if section.memory < 16 << 20:
        raise ValueError("memory must be at least 16M: an interpreter needs that much")
    if not 0.01 <= section.cpu <= 1024:
        raise ValueError("cpu must be between 0.01 and 1024 cores")
    if section.pids < 4:
        raise ValueError("pids must be at least 4")


class Durability(StrEnum):
    """When a reply is given out, and what it is worth then: docs/durability.md."""

    ASYNC = "async"
    COMMITTED = "committed"
    STRICT = "strict"


@dataclass(frozen=True, slots=True)
class StateSection:
    """`history`: how many versions of an instance's state are kept, with the present one."""

    durability: Durability = Durability.COMMITTED
    history: int = 10

    def __post_init__(self) -> None:
        if not 1 <= self.history <= 100:
            raise ValueError("history must be from 1 (nothing but the present) to 100")


@dataclass(frozen=True, slots=True)
class Policy:
    agent: AgentSection
    run: RunSection
    resources: ResourcesSection = field(default_factory=ResourcesSection)
    tasks: TasksSection = field(default_factory=TasksSection)
    network: NetworkSection = field(default_factory=NetworkSection)
    state: StateSection = field(default_factory=StateSection)

    def __post_init__(self) -> None:
        if self.run.port == PROXY_PORT and self.network.any:
            raise ValueError(
                f"run: port {PROXY_PORT} is the one where it finds the proxy to what it may reach"
            )

    @property
    def need(self) -> Resources:
        r = self.resources
        devices = tuple((name, 1) for name in sorted(r.devices))
        return Resources(r.memory, round(r.cpu * 1000), r.pids, devices)

    @property
    def disk(self) -> Disk:
        r = self.resources
        return Disk(r.disk, r.disk_read, r.disk_write)


def check_size(size: Resources) -> None:
    """BAD_REQUEST if no instance can have it."""
    try:
        ResourcesSection(Size(size.memory_bytes), size.cpu_millis / 1000, size.pids)
    except ValueError as error:
        raise RoostError(
            Reason.BAD_REQUEST, str(error), "docs/agent-toml.md lists what can be chosen"
        ) from error


def parse_policy(text: str, source: str = FILE_NAME) -> Policy:
    """The policy in `text`. AGENT_INVALID names the key that is wrong."""
    try:
        return config.load(Policy, text, source)
    except config.ConfigError as error:
        raise RoostError(
            Reason.AGENT_INVALID, str(error), "docs/agent-toml.md lists every key with an example"
        ) from error
