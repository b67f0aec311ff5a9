"""Clients that cancel, run out of time, leave and come back, while their node is killed.

What they were told holds. Each message is one line of the state, and at the end no line is there twice; what
was said to be durable is there; what was said to have changed nothing is not; and of what was given out
before its commit only that is missing which was said to be lost.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field

import pytest

from protos.v1 import attach_pb2
from shared.errors import RoostError
from tests.unit.edge_agent.attaching import Client, Node, node
from tests.unit.edge_agent.test_instance import Bench, bench

__all__ = ["bench", "node"]

NOTHING = ("!TURN_CANCELLED", "!TURN_DEADLINE", "!TURN_FAILED")
AGAIN = ("!TURN_NOT_COMMITTED", "!EPOCH_STALE", "!DEADLINE", "!AGENT_CRASHED", "!NODE_STOPPING")


@dataclass
class Told:
    durable: set[str] = field(default_factory=set)
    given_out: set[str] = field(default_factory=set)
    nothing: set[str] = field(default_factory=set)
    lost: int = 0


@dataclass
class User:
    name: str
    node: Node
    rng: random.Random
    told: Told
    given: attach_pb2.Given | None = None

    async def talk(self, turns: int) -> None:
        for n in range(turns):
            message = f"{self.name}{n}" + self.rng.choice(["", "", "", "-fail", "-wait"])
            while not await self.tried(message):
                continue

    async def tried(self, message: str) -> bool:
        """Is the end of this turn known?"""
        client = self.node.client()
        try:
            client.send(message, deadline_ms=self.rng.choice([0, 0, 0, 1, 5, 30]), given=self.given)
            for _ in range(self.rng.randrange(40)):
                await asyncio.sleep(0)
            match self.rng.randrange(6):
                case 0:
                    client.cancel(message)
                case 1:
                    return False  # and comes back
            end = (await client.said())[-1]
        except (ConnectionError, RoostError):
            await asyncio.sleep(0)
            return False
        finally:
            await client.leave()
        if end.startswith("="):
            self.note(client, message)
        elif end in NOTHING:
            self.told.nothing.add(message)
        else:
            assert end in AGAIN, (end, client.error)
            return False
        return True

    def note(self, client: Client, message: str) -> None:
        receipt = client.receipt
        self.told.lost += len(receipt.lost)
        (self.told.durable if receipt.durable else self.told.given_out).add(message)
        if not receipt.replayed:
            self.given = attach_pb2.Given(
                turn_id=message, node=receipt.node, version=receipt.version, durable=receipt.durable
            )


async def kill_again_and_again(node: Node, rng: random.Random) -> None:
    while True:
        for _ in range(rng.randrange(1000)):
            await asyncio.sleep(0)
        await node.kill()


@pytest.mark.parametrize("durability", ["strict", "committed", "async"])
@pytest.mark.parametrize("seed", range(4))
async def test_what_clients_were_told_holds(bench: Bench, node: Node, durability: str, seed: int) -> None:
    rng = random.Random(f"{durability} {seed}")
    node.become(durability)
    node.agents.let.set()
    told = Told()
    users = [User(name, node, rng, told) for name in "abcd"]
    killing = asyncio.create_task(kill_again_and_again(node, rng)) if seed % 2 else None
    try:
        async with asyncio.timeout(60.0):
            await asyncio.gather(*(user.talk(8) for user in users))
    finally:
        if killing:
            killing.cancel()
            await asyncio.wait({killing})
    if killing:
        await node.kill()  # whole, where the last may have been cut short and left a node that takes no turns
    async with asyncio.timeout(60.0):
        for user in users:
            while not await user.tried(f"{user.name}-end"):
                pass
    ana = node.client()
    lines = (await ana.ask("end"))[1:].split(",")
    assert len(set(lines)) == len(lines)
    assert told.durable <= set(lines)
    assert not told.nothing & set(lines)
    missing = told.given_out - set(lines)
    assert len(missing) <= told.lost
    assert missing == set() or durability == "async"
    assert node.supervisor._under_way == {}
