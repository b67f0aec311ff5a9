"""`agent.toml`: how to start an agent, what it may use, and how long things may take."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum

from shared import config
from shared.config import Duration, Size
from shared.errors import Reason, RoostError
from shared.identity import NAME_RULE, is_name
from shared.resources import Resources

FILE_NAME = "agent.toml"
_ENTRY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


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
    """`entry` is `module:object`, the `roost.Agent` to run."""

    entry: str
    start: Start = Start.AUTO
    start_timeout: Duration = Duration(10.0)
    turn_timeout: Duration = Duration(60.0)
    idle_timeout: Duration = Duration(300.0)

    def __post_init__(self) -> None:
        if not _ENTRY.fullmatch(self.entry):
            raise ValueError(f'entry {self.entry!r}: write module:object, like "chef:agent"')
        for name in ("start_timeout", "turn_timeout", "idle_timeout"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be more than 0")


@dataclass(frozen=True, slots=True)
class ResourcesSection:
    memory: Size = Size(128 << 20)
    cpu: float = 0.5
    pids: int = 64

    def __post_init__(self) -> None:
        if self.memory < 16 << 20:
            raise ValueError("memory must be at least 16M: an interpreter needs that much")
        if not 0.01 <= self.cpu <= 1024:
            raise ValueError("cpu must be between 0.01 and 1024 cores")
        if self.pids < 4:
            raise ValueError("pids must be at least 4")


@dataclass(frozen=True, slots=True)
class Policy:
    agent: AgentSection
    run: RunSection
    resources: ResourcesSection = field(default_factory=ResourcesSection)

    @property
    def need(self) -> Resources:
        r = self.resources
        return Resources(r.memory, round(r.cpu * 1000), r.pids)


def parse_policy(text: str, source: str = FILE_NAME) -> Policy:
    """The policy in `text`. AGENT_INVALID names the key that is wrong."""
    try:
        return config.load(Policy, text, source)
    except config.ConfigError as error:
        raise RoostError(
            Reason.AGENT_INVALID, str(error), "docs/agent-toml.md lists every key with an example"
        ) from error
