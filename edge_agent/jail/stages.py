"""All that is done to make a jail, in order, with who does it: to be read, not carried out.

What must hold: every list in here comes from the function whose result is carried out when a jail is made, so
that the two can't differ. What a zygote's child does is told in `forks`, beside what it is sent: it runs
another program, `roost/zygote.py`.
"""

from __future__ import annotations

from typing import assert_never

from edge_agent.jail import agent_process, forks, spawn, spawn_shell, spawn_zygote
from edge_agent.jail.directories import Directories
from edge_agent.jail.ground import Ground, ground_steps
from edge_agent.jail.operations import Operation
from edge_agent.jail.protocol import Make, Way
from edge_agent.jail.spawn import Opened, Spawned
from edge_agent.jail.steps import MapIds, Stage, described
from edge_agent.jail.wright import Tools

_UNMADE = MapIds(0, 0)


def stages(request: Make, tools: Tools, directories: Directories) -> tuple[Stage, ...]:
    """Refused for what no jail of this node can have."""
    ground = ground_steps(request, directories, tools.cgroups, Ground())
    match request.way:
        case Way.EXEC | Way.TASK:
            return _executed(request, tools, ground)
        case Way.ZYGOTE:
            return (
                Stage("jailer", (*ground, *spawn_zygote.birth(tools.cgroups, _nothing))),
                Stage(
                    "zygote",
                    (*spawn_zygote.walls(request, tools, 0), *spawn_zygote.last_steps(request)),
                ),
            )
        case Way.FORK:
            return (*_shell(request, tools), *_forked(request, tools, ground))
        case _:
            assert_never(request.way)


def _executed(request: Make, tools: Tools, ground: tuple[Operation, ...]) -> tuple[Stage, ...]:
    return (
        Stage("jailer", (*ground, *spawn.birth(tools.cgroups, _nothing))),
        Stage("init", spawn.walls(request, tools, Opened())),
        Stage("jailer", (_UNMADE,)),
        Stage("init", described(spawn.BECOMING_INIT)),
        Stage("agent's process", (*agent_process.first_steps(()), *agent_process.last_steps(request))),
    )


def _shell(request: Make, tools: Tools) -> tuple[Stage, ...]:
    return (
        Stage("jailer", spawn_shell.birth(_nothing)),
        Stage("builder", described(spawn_shell.BUILDING)),
        Stage("jailer", forks.preparing(0, [], _nothing)),
        Stage("init", described(spawn_shell.BEGINNING)),
        Stage("zygote's child", forks.told_ahead()),
        Stage("mounter", spawn_shell.mounting(request, tools, -1)),
    )


def _forked(request: Make, tools: Tools, ground: tuple[Operation, ...]) -> tuple[Stage, ...]:
    settling = spawn_shell.settling(request, _nobody, _UNMADE, tools.cgroups, tools.config)
    return (
        Stage("jailer", (*ground, *settling)),
        Stage("mounter", spawn_shell.finishing(-1, _nothing)),
        Stage(
            "init",
            (
                *described(spawn_shell.SETTLED),
                *described(spawn_shell.BECOMING_INIT),
                *described(spawn_shell.STAYING),
            ),
        ),
        Stage("jailer", forks.forking(request, 0, tools.cgroups, [], _nothing)),
        Stage("agent's process", forks.told(forks.order(request))),
    )


def _nothing(*arguments: object) -> None:
    raise AssertionError("this is to be read")


def _nobody() -> Spawned:
    raise AssertionError("this is to be read")
