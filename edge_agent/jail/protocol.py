"""What the daemon asks of the jailer, and what it hears back.

    daemon -> jailer  {"id": n, "do": "make", ...the request's fields}
    jailer -> daemon  {"id": n, "ok": {...}}                     descriptors beside it where said below
                      {"id": n, "error": {"message", "hint"}}
                      {"event": "exited", "jail_id", ...the Ended's fields}
                      {"event": "opening", "jail_id", "inode"}     see `Guard`

A jail's init is asked in the same way, over a socket of its own (`edge_agent.jail.init`). The jailer trusts
the daemon in nothing: `decode` is the only way in, and it checks names, types and ranges. Stdlib only, for
the jailer imports it.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

from shared import config

_NAME = re.compile(r"[a-z0-9-]{1,64}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_MAX_DEVICES = 16
_MAX_ARGS, _MAX_ARGS_BYTES = 256, 64 << 10

AGENT_ID = 1000  # uid and gid of the agent, as seen inside
STDERR_TAIL = 4096  # bytes


class Refused(Exception):
    """A request that can't be done: why, and what to do about it."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def body(self) -> dict[str, str]:
        return {"message": self.message, "hint": self.hint}


@dataclass(frozen=True, slots=True)
class Limits:
    """Memory in bytes, CPU in thousandths of a core, a count of processes; bytes of /state; bytes read from
    and written to the disk in a second, 0 for no limit."""

    memory_bytes: int
    cpu_millis: int
    pids: int
    disk_bytes: int = 1 << 30
    read_bps: int = 0
    write_bps: int = 0

    def __post_init__(self) -> None:
        bounds = (
            ("memory_bytes", self.memory_bytes, 1 << 20, 1 << 50),
            ("cpu_millis", self.cpu_millis, 10, 1 << 20),
            ("pids", self.pids, 1, 1 << 20),
            ("disk_bytes", self.disk_bytes, 1 << 20, 1 << 50),
            ("read_bps", self.read_bps, 0, 1 << 50),
            ("write_bps", self.write_bps, 0, 1 << 50),
        )
        for name, value, least, most in bounds:
            if not least <= value <= most:
                raise ValueError(f"{name} must be between {least} and {most}, not {value}")


class Way(StrEnum):
    """How the agent's process comes to be."""

    EXEC = "exec"  # init executes a program
    FORK = "fork"  # a zygote forks
    ZYGOTE = "zygote"  # it is a zygote itself
    TASK = "task"  # init executes a program that is no agent


@dataclass(frozen=True, slots=True)
class Make:
    """A new jail. Answered when its walls are up, with descriptors: a control socket, the agent's turn
    socket, and one or two that freeze the agent (see `cgroups.freezing`). A zygote is answered when it has
    imported its agent, without descriptors; a jail that is to be forked into names its `zygote`, of the same
    bundle. A task has no directory: its /state is in memory, and it ends with the daemon. `packages`: the id
    of a jail that has ended, whose state is bound read-only at /packages."""

    do: ClassVar[str] = "make"
    jail_id: str
    bundle: str
    argv: tuple[str, ...]
    env: tuple[str, ...]  # NAME=value
    limits: Limits
    way: Way = Way.EXEC
    zygote: str = ""
    devices: tuple[str, ...] = ()  # names, of those that the node's operator has given paths to
    packages: str = ""

    def __post_init__(self) -> None:
        _check_name("jail_id", self.jail_id)
        for device in self.devices:
            _check_name("device", device)
        if len(self.devices) > _MAX_DEVICES:
            raise ValueError(f"at most {_MAX_DEVICES} devices")
        _check_name("bundle", self.bundle)
        if self.packages:
            _check_name("packages", self.packages)
        if self.way is Way.FORK:
            _check_name("zygote", self.zygote)
        if not 1 <= len(self.argv) <= _MAX_ARGS or len(self.env) > _MAX_ARGS:
            raise ValueError(f"argv must have 1 to {_MAX_ARGS} parts, and env at most {_MAX_ARGS}")
        if sum(len(s) for s in (*self.argv, *self.env)) > _MAX_ARGS_BYTES:
            raise ValueError(f"argv and env are more than {_MAX_ARGS_BYTES} characters")
        if any("\0" in s for s in (*self.argv, *self.env)):
            raise ValueError("argv and env must hold no NUL")
        if not self.argv[0].startswith("/") and self.way is not Way.TASK:  # which is looked for inside
            raise ValueError("argv must start with an absolute path")
        for variable in self.env:
            if not _VARIABLE.fullmatch(variable.partition("=")[0]) or "=" not in variable:
                raise ValueError(f"env: {variable[:40]!r} is not NAME=value")


@dataclass(frozen=True, slots=True)
class List:
    """Ids of the jails that run: {"jail_ids": [...]}."""

    do: ClassVar[str] = "list"


@dataclass(frozen=True, slots=True)
class Attach:
    """The descriptors of a jail that runs, as after `Make`. An earlier daemon's control socket ends."""

    do: ClassVar[str] = "attach"
    jail_id: str


@dataclass(frozen=True, slots=True)
class Fork:
    """Starts the agent of a jail that was made to be forked into, once. Answered when its process runs."""

    do: ClassVar[str] = "fork"
    jail_id: str


@dataclass(frozen=True, slots=True)
class Measure:
    """{"memory_bytes", "cpu_seconds", "pids", "oom_kills"}."""

    do: ClassVar[str] = "measure"
    jail_id: str


@dataclass(frozen=True, slots=True)
class Resize:
    """Answered when the new limits hold; refused, with all as it was, if the jail has more memory than that
    and can't do without. /tmp and /dev/shm keep the size that they were made with."""

    do: ClassVar[str] = "resize"
    jail_id: str
    memory_bytes: int
    cpu_millis: int
    pids: int

    def __post_init__(self) -> None:
        Limits(self.memory_bytes, self.cpu_millis, self.pids)


@dataclass(frozen=True, slots=True)
class Listen:
    """Answered with one descriptor, of a socket that listens at 127.0.0.1:port inside."""

    do: ClassVar[str] = "listen"
    jail_id: str
    port: int

    def __post_init__(self) -> None:
        _check_port(self.port)


@dataclass(frozen=True, slots=True)
class Connect:
    """Answered with one descriptor, of a socket that connects to 127.0.0.1:port inside, and will say if
    nobody listens there."""

    do: ClassVar[str] = "connect"
    jail_id: str
    port: int

    def __post_init__(self) -> None:
        _check_port(self.port)


@dataclass(frozen=True, slots=True)
class Guard:
    """With a descriptor of a file of the jail's. Once answered, whoever opens that file in the jail waits
    until `Release`, and "opening" is told with its inode. A jail with a file that was not released ends with
    the daemon."""

    do: ClassVar[str] = "guard"
    jail_id: str


@dataclass(frozen=True, slots=True)
class Release:
    """With a descriptor of a file that is guarded: those who wait for it go on."""

    do: ClassVar[str] = "release"
    jail_id: str


@dataclass(frozen=True, slots=True)
class Kill:
    """Answered with the fields of its Ended when nothing of it is left but its directory."""

    do: ClassVar[str] = "kill"
    jail_id: str


@dataclass(frozen=True, slots=True)
class Directories:
    """Ids of jails with a directory, at most 1,000, in order, those after `after`: {"jail_ids": [...]}."""

    do: ClassVar[str] = "directories"
    after: str = ""


@dataclass(frozen=True, slots=True)
class Discard:
    """Answered when the jail's directory is gone."""

    do: ClassVar[str] = "discard"
    jail_id: str


OfJail = Attach | Fork | Measure | Resize | Listen | Connect | Kill
OfFile = Guard | Release
Request = Make | List | OfJail | OfFile | Directories | Discard
_KINDS: dict[str, type[Any]] = {
    kind.do: kind
    for kind in (
        *(Make, List, Attach, Fork, Measure, Resize, Listen, Connect, Kill),
        *(Guard, Release, Directories, Discard),
    )
}


@dataclass(frozen=True, slots=True)
class Ended:
    """How a jail ended: exit code or -signal of the agent's process."""

    code: int
    out_of_memory: bool
    stderr_tail: str = ""
    disk_full: bool = False


def encode(request: Request) -> dict[str, Any]:
    return {"do": request.do, **dataclasses.asdict(request)}


def decode(body: dict[str, Any]) -> Request:
    """The request in `body` (without its id). Refused names what is wrong with it."""
    fields = dict(body)
    kind = _KINDS.get(str(fields.pop("do", "")))
    if kind is None:
        raise Refused(f"there is no request {body.get('do')!r}")
    try:
        request: Request = config.from_table(kind, fields, kind.do)
        if hasattr(request, "jail_id"):
            _check_name("jail_id", request.jail_id)
    except config.ConfigError as error:
        raise Refused(str(error)) from error
    except ValueError as error:
        raise Refused(f"{kind.do}: {error}") from error
    return request


def _check_port(port: int) -> None:
    if not 1 <= port <= 65_535:
        raise ValueError(f"{port} is no port: use 1 to 65535")


def _check_name(what: str, name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{what} {name[:80]!r}: use 1 to 64 of a-z, 0-9 and -")
