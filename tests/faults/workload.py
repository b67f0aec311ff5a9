"""Clients that append unique numbers through turns, read, and repeat themselves, writing down what they hear.

One client has at most one operation under way. When an answer stays away it sends the same turn again a few
times, under its id, and then goes on: whether that turn is applied is then open. The dice only choose what to
do; which faults meet it is another matter.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from roost.client import AsyncChat, AsyncClient, Receipt
from shared.errors import Reason, RoostError
from tests.faults.cluster import Cluster
from tests.faults.history import History, Op, Outcome, Told
from tests.faults.plan import SLEEPY, USERS

AGENT = "ledger"
SEND_SECONDS = 5.0  # of one operation; longer than a node's TTL, so that a move is met within it
_SENDS = 4  # operations of one turn without an answer, before its client goes on
_IDLE = 2.2  # seconds after which an instance surely sleeps
_FAILED_PAUSE = 0.2
# Said by a node that has looked whether the turn is committed, and has run it: nothing has changed. After all
# others an earlier try, whose answer was lost, may have been applied.
_UNCHANGED = frozenset(
    {
        Reason.TURN_FAILED,
        Reason.TURN_TIMEOUT,
        Reason.AGENT_CRASHED,
        Reason.AGENT_OUT_OF_MEMORY,
        Reason.AGENT_START_FAILED,
    }
)


def told(receipt: Receipt) -> Told:
    return Told(
        receipt.node,
        receipt.epoch,
        receipt.version,
        receipt.resumed_from,
        receipt.resumed_version,
        receipt.lost,
        receipt.replayed,
    )


@dataclass
class Workload:
    cluster: Cluster
    seed: int
    users: tuple[str, ...] = USERS
    history: History = field(default_factory=History)
    outcomes: Counter[str] = field(default_factory=Counter)
    _numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))
    _last_ok: dict[str, float] = field(default_factory=dict)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """At the end each client finishes the operation that it is at."""
        stop = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for user in self.users:
                # One has a single client, which pauses often: its instance sleeps and wakes.
                for i in range(1 if user == SLEEPY else 2):
                    name = f"{user}{i}"
                    group.create_task(self._client(name, user, stop), name=f"client {name}")
            try:
                yield
            finally:
                stop.set()

    async def until_all_answer(self, timeout: float) -> list[str]:
        """Waits until each user has had an answer to something; those that had none in time."""
        since = time.monotonic()
        while time.monotonic() < since + timeout:
            waiting = [u for u in self.users if self._last_ok.get(u, 0.0) <= since]
            if not waiting:
                return []
            await asyncio.sleep(0.05)
        return waiting

    async def append(self, chat: AsyncChat, user: str, turn: str, timeout: float = SEND_SECONDS) -> Op:
        """The next number, under this turn id."""
        return await self.send(chat, user, user, turn, next(self._numbers), timeout)

    async def one_more(self, user: str, coordinator: str = "") -> Op:
        """A number is appended by somebody else, who asks `coordinator` first; sent until there is an answer,
        twice at most."""
        turn, number = uuid.uuid4().hex, next(self._numbers)
        async with self.cluster.client(coordinator) as client, client.attach(AGENT, user) as chat:
            for _ in range(2):
                op = await self.send(chat, f"other-{user}", user, turn, number)
                if op.outcome != "info":
                    break
        return op

    async def read_all(self, timeout: float) -> None:
        """The final state of each user so far, by a new client; one that can't be read in time has none."""
        await asyncio.gather(*(self._read(user, timeout) for user in self.history.users()))

    async def _read(self, user: str, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        async with self.cluster.client() as client:
            turn = uuid.uuid4().hex
            while (left := deadline - time.monotonic()) > 0:
                async with client.attach(AGENT, user) as chat:
                    op = await self.send(chat, f"final-{user}", user, turn, None, left)
                if op.outcome == "ok":
                    self.history.final[user] = op.lists()[0]
                    return
                await asyncio.sleep(0.2)

    async def _client(self, name: str, user: str, stop: asyncio.Event) -> None:
        dice = random.Random(f"{self.seed} {name}")
        async with self.cluster.client() as client:
            while not stop.is_set():
                async with client.attach(AGENT, user) as chat:
                    for _ in range(dice.randint(1, 30)):
                        if stop.is_set():
                            return
                        await self._step(chat, client, name, user, dice)

    async def _step(
        self, chat: AsyncChat, client: AsyncClient, name: str, user: str, dice: random.Random
    ) -> None:
        turn = uuid.UUID(int=dice.getrandbits(128)).hex
        number = next(self._numbers) if dice.random() < 0.85 else None
        for _ in range(_SENDS):
            op = await self.send(chat, name, user, turn, number)
            if op.outcome != "info":
                break
            await asyncio.sleep(_FAILED_PAUSE)
        if op.outcome == "ok" and dice.random() < 0.15:  # as a client does that lost the answer
            async with client.attach(AGENT, user) as another:
                await self.send(another, name, user, turn, number)
        if op.outcome != "ok":
            await asyncio.sleep(_FAILED_PAUSE)
        await asyncio.sleep(
            _IDLE if dice.random() < (0.2 if user == SLEEPY else 0.01) else dice.uniform(0.0, 0.1)
        )

    async def send(
        self,
        chat: AsyncChat,
        client: str,
        user: str,
        turn: str,
        number: int | None,
        timeout: float = SEND_SECONDS,
    ) -> Op:
        invoked = time.monotonic()
        outcome: Outcome = "info"
        text, receipt, said = "", None, ""
        try:
            reply = await chat.send("read" if number is None else f"append {number}", turn, timeout)
            outcome, text, receipt = "ok", reply.text, told(reply.receipt)
        except RoostError as error:
            said = f"{error.reason}: {error.message}"
            outcome = "fail" if error.reason in _UNCHANGED else "info"
        ended = time.monotonic()
        op = Op(client, user, turn, number, invoked, ended, outcome, text, receipt, said)
        self.history.ops.append(op)
        self.outcomes[outcome] += 1
        if outcome == "ok":
            self._last_ok[user] = ended
        return op
