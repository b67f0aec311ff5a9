"""Starts the turns of timers that are due, with nobody attached.

`decide` says, purely, what a timer calls for here and now. Each timer that is due is the business of one
coordinator: the one that holds the link of the instance's owner, or, while there is no owner that lives, one
that all agree on. It places the instance, if need be, as for a client, and tells its node.

Always true: so many turns run at once for one node, and for all; those that are due longest come first. A
timer is late when its turn has to wait, and never early by this coordinator's clock.

How it can fail: by everything that a turn can fail by; then it is tried again, later each time. If the link
breaks meanwhile, the node is asked again, by whoever holds its link then, and tells of the turn under way.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from coordinator.placement import Client
from coordinator.records import AgentRecord, InstanceRecord, NodeRecord, NodeState, Stored
from coordinator.resolving import Resolved
from coordinator.timers import (
    MAX_ATTEMPTS,
    InstanceTimers,
    Timer,
    Timers,
    after_failure,
    claimed,
    given_up,
)
from protos.v1 import link_pb2, timers_pb2
from shared.errors import Reason, RoostError
from shared.identity import InstanceKey
from shared.policy import parse_policy

log = logging.getLogger(__name__)

AT_ONCE = 128  # turns of timers that this coordinator waits for
AT_ONCE_OF_A_NODE = 8
_MARGIN = (
    90.0  # seconds that a turn may take beside what its agent's policy allows: to wait, store and commit
)
_CLAIM = 10.0  # seconds in which no other coordinator starts it
_FIRST_PAUSE, _LAST_PAUSE = 1.0, 60.0  # seconds before an instance that can't be placed is tried again


# --- what a timer calls for ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Seen:
    """An instance's timers, and its owner as far as it is known."""

    timers: Stored[InstanceTimers]
    instance: InstanceRecord | None
    owner: NodeRecord | None

    @property
    def owner_lives(self) -> bool:
        return self.owner is not None and self.owner.state is NodeState.UP


def is_due(timer: Timer, seen: Seen, now: float) -> bool:
    """A claim holds while the daemon that it went to still owns the instance."""
    if timer.failed or now < timer.due:
        return False
    return now >= timer.next or (bool(timer.started_id) and not _is_with(timer, seen))


def _is_with(timer: Timer, seen: Seen) -> bool:
    if seen.instance is None or seen.owner is None or not seen.owner_lives:
        return False
    return (seen.instance.epoch, seen.owner.info.started_id) == (timer.epoch, timer.started_id)


def is_mine(seen: Seen, me: str, linked: Collection[str], alive: Collection[str]) -> bool:
    if seen.owner is not None and seen.owner_lives:
        return seen.owner.info.id in linked
    key = str(seen.timers.value.key)
    return me == max({me, *alive}, key=lambda c: hashlib.sha256(f"{c}\n{key}".encode()).digest())


def first_due(seen: Seen, now: float) -> Timer | None:
    """One at a time: turns of an instance are serial."""
    due = [timer for timer in seen.timers.value.timers if is_due(timer, seen, now)]
    return min(due, key=lambda timer: timer.due, default=None)


def choose(
    due: Iterable[tuple[Seen, Timer]], running: Collection[InstanceKey], of_node: Counter[str]
) -> list[tuple[Seen, Timer]]:
    """Which of them start now, beside those that run."""
    counts = Counter(of_node)
    chosen: list[tuple[Seen, Timer]] = []
    for seen, timer in sorted(due, key=lambda pair: pair[1].due):
        node = seen.instance.node if seen.instance is not None else ""
        if len(running) + len(chosen) >= AT_ONCE:
            break
        if seen.timers.value.key in running or counts[node] >= AT_ONCE_OF_A_NODE:
            continue
        counts[node] += 1
        chosen.append((seen, timer))
    return chosen


# --- doing it ------------------------------------------------------------------------------------


class View(Protocol):
    """What is known of timers and who would run them. Real: `coordinator.cache` and `registry`."""

    def scheduled(self) -> Iterable[Seen]: ...

    def linked(self) -> Collection[str]: ...

    def alive(self) -> Collection[str]: ...

    def agent(self, tenant: str, name: str) -> AgentRecord | None: ...


class Resolver(Protocol):
    async def resolve(self, key: InstanceKey, client: Client) -> Resolved: ...


class Nodes(Protocol):
    """Those that are linked here."""

    def started_id(self, node: str) -> str | None: ...

    async def wake(self, node: str, wake: link_pb2.Wake, timeout: float) -> None:
        """Returns when the turn is committed; what it failed with, or NODE_UNREACHABLE."""
        ...


@dataclass(slots=True)
class _Pause:
    until: float  # on the wall clock
    length: float


@dataclass
class Alarms:
    """`reconcile` is to be run every half a second or so."""

    me: str
    view: View
    timers: Timers
    resolver: Resolver
    nodes: Nodes
    clock_unix: Callable[[], float]
    _running: dict[InstanceKey, str] = field(default_factory=dict)  # and on which node
    _pauses: dict[InstanceKey, _Pause] = field(default_factory=dict)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def reconcile(self) -> None:
        now = self.clock_unix()
        self._pauses = {k: p for k, p in self._pauses.items() if now < p.until + _LAST_PAUSE}
        linked, alive = self.view.linked(), self.view.alive()
        due = [
            (seen, timer)
            for seen in self.view.scheduled()
            if not self._paused(seen.timers.value.key, now)
            and (timer := first_due(seen, now)) is not None
            and is_mine(seen, self.me, linked, alive)
        ]
        for seen, timer in choose(due, self._running, Counter(self._running.values())):
            key = seen.timers.value.key
            self._running[key] = seen.instance.node if seen.instance is not None else ""
            task = asyncio.create_task(self._run(key, seen, timer), name=f"timer {timer.name} of {key}")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _paused(self, key: InstanceKey, now: float) -> bool:
        pause = self._pauses.get(key)
        return pause is not None and now < pause.until

    async def _run(self, key: InstanceKey, seen: Seen, timer: Timer) -> None:
        try:
            await self._wake(key, seen.timers, timer)
            self._pauses.pop(key, None)
        except RoostError as error:
            before = self._pauses.get(key)
            length = min(_LAST_PAUSE, before.length * 2) if before else _FIRST_PAUSE
            self._pauses[key] = _Pause(self.clock_unix() + length, length)
            log.warning("timer %s of %s waits %g s: %s", timer.name, key, length, error.message)
        except Exception:
            log.exception("timer %s of %s: a bug", timer.name, key)
            self._pauses[key] = _Pause(self.clock_unix() + _LAST_PAUSE, _LAST_PAUSE)
        finally:
            self._running.pop(key, None)

    async def _wake(self, key: InstanceKey, seen: Stored[InstanceTimers], timer: Timer) -> None:
        """RoostError if the turn could not even be started."""
        record = (await self.resolver.resolve(key, Client())).record
        started_id = self.nodes.started_id(record.node)
        if started_id is None:
            return  # it went to a node that is linked elsewhere: that coordinator's business now
        self._running[key] = record.node
        claim = claimed(timer, record.epoch, started_id, self.clock_unix() + _CLAIM)
        if claim.attempts > MAX_ATTEMPTS:  # and how the last ones ended, nobody could tell
            log.warning("timer %s of %s is given up: cut off again and again", timer.name, key)
            await self.timers.claim(seen, timer, given_up(timer))
            return
        if await self.timers.claim(seen, timer, claim) is None:
            return  # somebody was faster, or it was changed
        what = timers_pb2.Timer(name=timer.name, message=timer.message, turn_id=timer.turn_id)
        wake = link_pb2.Wake(key=key.to_proto(), epoch=record.epoch, timer=what)
        try:
            await self.nodes.wake(record.node, wake, self._patience(key))
        except RoostError as error:
            await self._ended(key, timer, error)
        else:
            await self._ended(key, timer, None)

    async def _ended(self, key: InstanceKey, timer: Timer, error: RoostError | None) -> None:
        if error is not None and error.reason is Reason.NODE_UNREACHABLE:
            return  # it may still come to its end: its commit says so, or who asks the node again
        if error is None or error.reason is Reason.TURN_REPLY_GONE:
            await self.timers.change(key, timer.turn_id, lambda _: None)  # its commit has ended it already
            return
        log.warning("timer %s of %s failed: %s: %s", timer.name, key, error.reason, error.message)
        now = self.clock_unix()
        await self.timers.change(key, timer.turn_id, lambda t: after_failure(t, error, now))

    def _patience(self, key: InstanceKey) -> float:
        agent = self.view.agent(key.tenant, key.agent)
        run = parse_policy(agent.policy_toml).run if agent else None
        return _MARGIN + (run.turn_timeout + run.start_timeout if run else 0.0)
