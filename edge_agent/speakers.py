"""How a node talks to an agent: over the socket that it inherits, or by HTTP."""

from __future__ import annotations

from typing import Protocol

from edge_agent.effects import TurnCalls
from edge_agent.jail.api import Jail
from edge_agent.tasks import TurnTasks
from edge_agent.turns import Deltas, Turn, run_turn, wait_ready
from shared.policy import RunSection


class Speaker(Protocol):
    """Always true of both: a wait ends with its timeout, what an agent sends is bounded before it is kept,
    and a turn ends with the whole reply or with an error that names what the agent did."""

    async def ready(self, jail: Jail, timeout: float) -> None:
        """Waits until the agent can take turns. AGENT_START_FAILED says why it can't."""
        ...

    async def turn(
        self, jail: Jail, turn: Turn, deltas: Deltas, tasks: TurnTasks, calls: TurnCalls, timeout: float
    ) -> str:
        """The agent's reply. TURN_FAILED, TURN_TIMEOUT, AGENT_CRASHED or AGENT_OUT_OF_MEMORY otherwise.

        Its tasks have ended then.
        JailGone: the agent had ended before it got this turn.
        """
        ...


class SocketSpeaker:
    """docs/agent-protocol.md."""

    async def ready(self, jail: Jail, timeout: float) -> None:
        await wait_ready(jail, timeout)

    async def turn(
        self, jail: Jail, turn: Turn, deltas: Deltas, tasks: TurnTasks, calls: TurnCalls, timeout: float
    ) -> str:
        return await run_turn(jail, turn, deltas, tasks, calls, timeout)


def speaker_of(run: RunSection) -> Speaker:
    if run.port:
        from edge_agent.http_turns import HttpSpeaker  # its parser costs memory, and few nodes need it

        return HttpSpeaker(run.port, run.path)
    return SocketSpeaker()
