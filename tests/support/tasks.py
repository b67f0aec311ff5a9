"""Tasks of a turn without an instance."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edge_agent.control import Agent
from edge_agent.reservations import Reservations
from edge_agent.tasks import Tasks, TurnTasks
from edge_agent.tenure import Tenure
from shared.resources import Resources
from tests.support.fake_control import AGENT
from tests.support.fake_jails import FakeAgent, FakeJails, TaskProgram


async def _silent(agent: FakeAgent) -> None:
    await agent.hang()


@dataclass
class Hearing:
    """A jail that is only told things. `open`: whether it reads them."""

    heard: list[dict[str, Any]] = field(default_factory=list)

    async def send(self, message: bytes) -> None:
        self.heard.append(json.loads(message))


class TaskBench:
    """A node with room for `capacity`, whose tasks do what `program` says."""

    def __init__(self, directory: Path, program: TaskProgram, capacity: Resources) -> None:
        self.jails = FakeJails(directory / "jails", _silent, program)
        self.reservations = Reservations("edge-1", capacity)
        self.tenure = Tenure()
        self.tenure.welcomed(0.0, 1e9)
        self.now = 0.0
        self.tasks = Tasks(self.jails, self.reservations, self.tenure, lambda: self.now)

    def of_turn(self, jail: object, agent: Agent = AGENT) -> TurnTasks:
        return self.tasks.of_turn(agent, jail, "t1")  # type: ignore[arg-type]


def no_tasks() -> TurnTasks:
    """For turns that ask for none."""

    async def none(task: object) -> int:
        raise AssertionError

    return TaskBench(Path("/nowhere"), none, Resources()).of_turn(Hearing())
