"""What `roost-edge --plan` prints: the stages in which this node would make a jail of an agent. Nothing is
carried out; it needs no root and no node that runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from edge_agent.config import EdgeConfig
from edge_agent.control import Agent
from edge_agent.jail import cgroups
from edge_agent.jail.api import JailSpec
from edge_agent.jail.client import make_request
from edge_agent.jail.config import jailer_config
from edge_agent.jail.directories import Directories
from edge_agent.jail.protocol import Way
from edge_agent.jail.quota import kernel_quota
from edge_agent.jail.roots import System
from edge_agent.jail.stages import stages
from edge_agent.jail.wright import Tools
from edge_agent.specs import of_instance, of_zygote
from edge_agent.task_messages import parse_run
from shared import config
from shared.errors import Reason, RoostError
from shared.policy import FILE_NAME

WAYS = ("exec", "zygote", "task")
_DATA_DIR = Path("/var/lib/roost")
_ZYGOTE, _INSTANCE, _TASK = "zygote", "instance", "task"


def plan_of(source: str, way: str, version: str, packages: bool, config_file: Path | None) -> dict[str, Any]:
    """`source`: an agent.toml, a directory with one, or "-" for standard input. `packages`: the agent brings
    some along. RoostError or Refused for what no jail can be made of."""
    edge = EdgeConfig("here", _DATA_DIR, ("127.0.0.1:1",))
    if config_file is not None:
        edge = config.load_file(EdgeConfig, config_file)
    jailer = jailer_config(edge, config_file or Path("edge.toml"))
    agent = Agent.of(version, _read(source), "")
    tools = Tools(jailer, System.survey(), cgroups.detect(_existing(jailer.data_dir)), 0)
    directories = Directories(jailer)
    with suppress(OSError):  # it is another user's
        directories.quota = kernel_quota(_existing(jailer.jails_dir))
    return {
        "agent": agent.policy.agent.name,
        "version": version,
        "way": way,
        "roost": metadata.version("roost"),
        "config": str(config_file) if config_file else "",
        "stages": [
            {"jail": jail, "who": stage.who, "operations": [o.describe() for o in stage.does]}
            for jail, spec, how in _specs(agent, way, "packages" if packages else "", edge.capacity.memory)
            for stage in stages(make_request(spec, how), tools, directories)
        ],
    }


def _specs(
    agent: Agent, way: str, packages: str, capacity_bytes: int
) -> Iterator[tuple[str, JailSpec, Way | None]]:
    """The jails that it takes, in order. In place of the ids that they will have are words for them."""
    policy = agent.policy
    match way:
        case "exec":
            yield _INSTANCE, of_instance(_INSTANCE, agent, policy.need, packages, ""), None
        case "zygote":
            if not policy.run.entry:
                raise RoostError(
                    Reason.BAD_REQUEST,
                    f"{policy.agent.name} has a command and no entry, so there is no zygote of it",
                    "ask for --way exec",
                )
            yield _ZYGOTE, of_zygote(_ZYGOTE, agent, capacity_bytes, packages), Way.ZYGOTE
            yield _INSTANCE, of_instance(_INSTANCE, agent, policy.need, packages, _ZYGOTE), None
        case _:
            run = parse_run({"task": _TASK, "argv": ["(what the agent asks for)"]}, policy.tasks)
            yield _TASK, JailSpec(_TASK, agent.version, run.argv, limits=run.need), Way.TASK


def _read(source: str) -> str:
    if source == "-":
        return sys.stdin.read()
    path = Path(source)
    try:
        return (path / FILE_NAME if path.is_dir() else path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise RoostError(Reason.AGENT_INVALID, f"{source} can't be read: {error}") from error


def _existing(path: Path) -> Path:
    """It, or the nearest above it that is there: what it will be made in."""
    return path if path.exists() else _existing(path.parent)
