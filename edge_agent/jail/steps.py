"""Operations beside those of `plan`: namespaces, ids, programs. And stages of a jail's making: who carries
out which list of them."""

from __future__ import annotations

import json
import logging
import os
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from edge_agent.jail import kernel
from edge_agent.jail.operations import Do, Operation, PlanFailed
from edge_agent.jail.protocol import AGENT_ID

log = logging.getLogger(__name__)

_KINDS = (
    (kernel.CLONE_NEWUSER, "user"),
    (kernel.CLONE_NEWNS, "mount"),
    (kernel.CLONE_NEWPID, "pid"),
    (kernel.CLONE_NEWNET, "network"),
    (kernel.CLONE_NEWIPC, "ipc"),
    (kernel.CLONE_NEWUTS, "uts"),
    (kernel.CLONE_NEWCGROUP, "cgroup"),
)


T = TypeVar("T")
Script = tuple[tuple[str, Callable[[T], object]], ...]


def run(script: Script[T], on: T, progress: Callable[[Operation], None] | None = None) -> None:
    """As `carry_out`, for those who keep for life what they touch: a script is there before they are forked.
    Operations that are made where they are carried out cost the init of a shell 200 KiB."""
    for what, act in script:
        if progress is not None:
            progress(Do(what, lambda: None))
        try:
            act(on)
        except OSError as error:
            raise PlanFailed(Do(what, lambda: None), error) from error


def described(script: Script[T]) -> tuple[Operation, ...]:
    """To be read, not carried out."""
    return tuple(Do(what, lambda: None) for what, _ in script)


def note(operation: Operation) -> None:
    """What the jailer does when no `Progress` is there to be told."""
    if log.isEnabledFor(logging.DEBUG):
        log.debug("jailer: %s", operation.describe())


@dataclass(frozen=True, slots=True)
class Stage:
    """What one process does before another goes on."""

    who: str
    does: tuple[Operation, ...]


def kinds_of(flags: int) -> str:
    return ", ".join(name for flag, name in _KINDS if flags & flag)


def cloning(whom: str, flags: int, inside: bool = False) -> str:
    """`inside`: it begins its life in the jail's control groups."""
    where = " in the jail's control groups" if inside else ""
    return f"clone {whom}{where} with new namespaces: {kinds_of(flags)}"


def entering(flags: int) -> str:
    return f"enter new namespaces: {kinds_of(flags)}"


def keeping(capabilities: tuple[int, ...]) -> str:
    if not capabilities:
        return "drop all capabilities, and all from what anything executed later could get"
    return f"keep the capabilities {', '.join(kernel.CAPABILITIES[c] for c in capabilities)}, and no others"


@dataclass(frozen=True, slots=True)
class Unshare:
    flags: int

    def describe(self) -> str:
        return entering(self.flags)

    def execute(self) -> None:
        kernel.unshare(self.flags)


@dataclass(frozen=True, slots=True)
class MapIds:
    """Of a process in a user namespace that has none yet: inside 0 is `init_uid`, and the agent is the next
    one; uids and gids alike."""

    pid: int
    init_uid: int

    def describe(self) -> str:
        return f"map uids and gids 0 (init) and {AGENT_ID} (agent) to two that no other jail has"

    def execute(self) -> None:
        text = f"0 {self.init_uid} 1\n{AGENT_ID} {self.init_uid + 1} 1\n".encode()
        for name in ("uid_map", "gid_map"):
            fd = os.open(f"/proc/{self.pid}/{name}", os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(fd, text)
            finally:
                os.close(fd)


@dataclass(frozen=True, slots=True)
class KeepCapabilities:
    """All others are dropped, and all from what anything executed later could get."""

    kept: tuple[int, ...]

    def describe(self) -> str:
        return keeping(self.kept)

    def execute(self) -> None:
        kernel.keep_capabilities(self.kept)


@dataclass(frozen=True, slots=True)
class Execute:
    argv: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)

    def describe(self) -> str:
        argv = " ".join(json.dumps(part) if "'" in part else shlex.quote(part) for part in self.argv)
        names = " ".join(sorted(self.environment))
        return f"execute {argv} with {names} as its environment, and nothing else"

    def execute(self) -> None:
        os.execvpe(self.argv[0], self.argv, self.environment)
