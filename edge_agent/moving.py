"""A node's part in the moves of instances: it prepares to take one, or lets one go.

Always true: between a release and the outcome no turn of the instance runs here; its jail stands still, and
turns that come wait behind it. The outcome is an eviction (they are told so, and go elsewhere), a word to
keep on, or nothing at all for a while: then they run here. Should the instance have moved all the same, the
epoch refuses their commits. What was prepared here and never came is only a cache, and room that runs out.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from edge_agent.instance import Instance
from edge_agent.link import agent_from_proto
from edge_agent.phases import Live, Parts
from edge_agent.state.prefetch import prefetch
from protos.v1 import link_pb2
from shared import inline
from shared.errors import Reason, RoostError
from shared.identity import InstanceKey
from shared.resources import Resources

log = logging.getLogger(__name__)

_WARM = 10.0  # seconds that a preparation waits for a zygote, which saves its import later


@dataclass(slots=True)
class _Gate:
    """`closed`: no turn runs, and none can begin. `opened`: the outcome is known."""

    closed: asyncio.Future[bool]  # had it a process?
    opened: asyncio.Event = field(default_factory=asyncio.Event)


class Moving:
    def __init__(
        self,
        parts: Parts,
        instance: Callable[[InstanceKey, int], Awaitable[Instance]],
        reserve: Callable[[InstanceKey, int, Resources, float], None],
    ) -> None:
        """`instance` gives the one of a key and epoch, or EPOCH_STALE; `reserve` keeps room, or refuses."""
        self._parts = parts
        self._instance = instance
        self._reserve = reserve
        self._gates: dict[InstanceKey, _Gate] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def step(self, step: link_pb2.MoveStep) -> link_pb2.MoveStepReply:
        key = InstanceKey.from_proto(step.key)
        reply = link_pb2.MoveStepReply()
        match step.WhichOneof("step"):
            case "prepare":
                reply.bytes = await self._prepare(key, step.epoch, step.prepare)
            case "release":
                reply.live, began = await self._release(key, step.epoch, step.release)
                reply.micros = round((self._parts.clock() - began) * 1e6)
            case "ready":
                await (await self._instance(key, step.epoch)).wake()
            case "keep_on":
                self.open(key)
            case _:
                raise RoostError(
                    Reason.BAD_REQUEST, "a part of a move that this node does not know", "is it older?"
                )
        return reply

    def open(self, key: InstanceKey) -> None:
        """The outcome is known: turns of the instance, if any wait, may begin or be refused."""
        if gate := self._gates.get(key):
            gate.opened.set()

    # --- as the target -------------------------------------------------------------------------------

    async def _prepare(self, key: InstanceKey, epoch: int, request: link_pb2.Prepare) -> int:
        """Bytes of state that were fetched."""
        agent = agent_from_proto(request.agent)
        size = Resources.from_proto(request.size) if request.HasField("size") else None
        need, hold = agent.policy.need.sized(size), request.hold_ms / 1000
        if hold:
            self._reserve(key, epoch, need, hold)
        if not request.seen and hold:
            await self._parts.state.bundles.ensure(agent.version, agent.bundle_root)
            packages = await self._parts.packages.ensure(agent, _nobody)
            await self._parts.starts.expect(agent, packages, _WARM)
        state = self._parts.state.beside(inline.readable(request.inline))
        fetched = await prefetch(state, key, request.version, request.root)
        if hold:
            self._reserve(key, epoch, need, hold)  # for as long as if it had taken no time
        return fetched

    # --- as the source -------------------------------------------------------------------------------

    async def _release(self, key: InstanceKey, epoch: int, request: link_pb2.Release) -> tuple[bool, float]:
        """Had it a process, and since when can no turn begin?"""
        instance = await self._instance(key, epoch)
        if key in self._gates:
            raise RoostError(Reason.MOVE_GIVEN_UP, f"{key} is being moved already", "wait for that to end")
        gate = self._gates[key] = _Gate(asyncio.get_running_loop().create_future())
        task = asyncio.create_task(
            self._hold(instance, gate, request.turn_ms / 1000, request.hold_ms / 1000), name=f"move {key}"
        )
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            return await asyncio.shield(gate.closed), self._parts.clock()
        except asyncio.CancelledError:  # the link broke: whoever asked takes it for refused
            task.cancel()
            raise

    async def _hold(self, instance: Instance, gate: _Gate, turn: float, hold: float) -> None:
        """Closes the gate, and opens it at the outcome or after `hold` seconds."""
        try:
            async with instance.between_turns(turn):
                gate.closed.set_result(isinstance(instance.state, Live))
                try:
                    async with asyncio.timeout(hold):
                        await gate.opened.wait()
                except TimeoutError:
                    log.warning(
                        "%s: nobody said whether it moved, so it takes turns here again", instance.key
                    )
        except RoostError as error:
            if not gate.closed.done():
                gate.closed.set_exception(error)
        finally:
            del self._gates[instance.key]
            gate.closed.cancel()


def _nobody(text: str) -> None:
    """Nobody waits who would want to know."""
