"""How an instance's process comes to be: claimed from the pool, forked from a zygote, or executed.

Always true: a parked jail is given away once, and before that nothing of any user has been in it; a version
whose zygote failed twice is executed. No user waits for a zygote or the pool: what is not there yet is not
used. How it can fail: what was chosen turns out to be gone; then the next way in `ways` is tried.

Parked jails are of two ranks. A cold one has only become its agent: it has little memory of its own, and what
a first turn needs it makes in that turn. Those that are next to be given away are warm: they have made it.
While a jail is warmed up it is not given away; one that fails to get warm ends, and a version whose jails
failed twice waits cold from then on.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import uuid
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, assert_never

from edge_agent import pool
from edge_agent.control import Agent
from edge_agent.egress.proxy import Egress
from edge_agent.jail.api import Jail, JailGone, Jails, Zygote
from edge_agent.reservations import Reservations
from edge_agent.specs import of_instance, of_zygote, parks
from edge_agent.turns import wait_ready
from shared.errors import Reason, RoostError
from shared.policy import Start
from shared.resources import Resources, fits

log = logging.getLogger(__name__)

PERIOD = 0.5
ZYGOTE_QUIET = 600.0  # seconds without a start after which it is ended
_FAILURES = 2
_PAUSE = 5.0  # seconds before a zygote is started again, or a jail parked, after that has failed
_ZYGOTE_ID = re.compile(r"zygote-.*-[0-9a-f]{16}")  # an instance's ends with 24
_WARM = json.dumps({"kind": "warm"}).encode()


@dataclass(frozen=True, slots=True)
class Parked:
    """It runs and is ready, warm or cold; its /state is empty, and no code of the agent has looked at it."""

    jail: Jail


@dataclass(frozen=True, slots=True)
class FromZygote:
    jail_id: str


@dataclass(frozen=True, slots=True)
class Exec:
    pass


Way = Parked | FromZygote | Exec


def name_of(way: Way) -> str:
    match way:
        case Parked():
            return "parked"
        case FromZygote():
            return "zygote"
        case Exec():
            return "exec"
        case _:
            assert_never(way)


def is_agents_fault(error: RoostError | JailGone) -> bool:
    """Another way of starting would end no better."""
    return isinstance(error, RoostError) and error.reason is not Reason.JAIL_FAILED


@dataclass(slots=True)
class _Version:
    agent: Agent
    packages: str
    demand: pool.Demand
    cold: list[Jail] = field(default_factory=list)
    warm: list[Jail] = field(default_factory=list)
    parking: int = 0
    park_after: float = 0.0
    warming: int = 0
    not_warmed: int = 0  # jails that failed to get warm
    zygote: Zygote | None = None
    preparing: bool = False  # the zygote
    tried: asyncio.Event = field(default_factory=asyncio.Event)  # to prepare it
    failures: int = 0
    not_before: float = 0.0

    @property
    def start(self) -> Start:
        run = self.agent.policy.run
        return run.start if run.entry else Start.EXEC

    @property
    def waiting(self) -> int:
        """Jails that wait for a user, and those on their way to."""
        return len(self.cold) + len(self.warm) + self.parking + self.warming

    @property
    def demand_now(self) -> pool.Demand:
        return replace(self.demand, waiting=self.waiting)

    @property
    def live_zygote(self) -> Zygote | None:
        return self.zygote if self.zygote is not None and not self.zygote.ended else None


class Starts:
    """`reconcile` is to be run every PERIOD seconds, and when `changed` is called."""

    def __init__(
        self,
        jails: Jails,
        reservations: Reservations,
        egress: Egress,
        clock: Callable[[], float],
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self._jails = jails
        self._reservations = reservations
        self._egress = egress
        self._clock = clock
        self._changed = changed
        self._versions: dict[str, _Version] = {}
        self._held_back = False
        self._trash: set[str] = set()  # directories of what was ended
        self._tasks: set[asyncio.Task[None]] = set()

    def ways(self, agent: Agent, packages: str, is_new_here: bool) -> Iterator[Way]:
        """What to try, in this order. A Parked one belongs to the caller from then on. `packages`: see
        JailSpec. `is_new_here`: the instance has no directory on this node."""
        version = self._wanted(agent, packages)
        self._forget_ended(version)
        if is_new_here and (waiting := version.warm or version.cold):
            yield Parked(waiting.pop())
        if version.start is not Start.EXEC and (zygote := version.live_zygote):
            yield FromZygote(zygote.jail_id)
        yield Exec()

    async def expect(self, agent: Agent, packages: str, seconds: float) -> None:
        """One of this version will be started here soon. Returns when there is a zygote of it, or one can't
        be had, or `seconds` are over."""
        version = self._wanted(agent, packages)
        if version.start is not Start.EXEC:
            if not version.tried.is_set():
                self._changed()
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await version.tried.wait()

    def _wanted(self, agent: Agent, packages: str) -> _Version:
        version = self._versions.get(agent.version)
        if version is None:
            need = agent.policy.need
            version = self._versions[agent.version] = _Version(agent, packages, pool.Demand(need, (), 0))
        version.demand = version.demand.started(self._clock())
        self._look_soon()
        return version

    def _look_soon(self) -> None:
        """Has a pass run when whoever has just come has got the first reply: it would take time from that."""
        asyncio.get_running_loop().call_later(pool.PAUSE, self._changed)

    def left_behind(self, jail_id: str) -> None:
        """A directory of an earlier daemon's that could not be removed. A zygote's, whose uid owns namespaces
        of instances that live on, is tried again; any other may be in use again by then."""
        if _ZYGOTE_ID.fullmatch(jail_id):
            self._trash.add(jail_id)

    def discard(self, jail_id: str) -> None:
        """Its directory is of no more use, and goes soon. Should it be used again all the same, nothing is
        wrong, even if it goes then: files count for nothing until they were looked at."""
        self._trash.add(jail_id)
        self._look_soon()

    @property
    def parked(self) -> int:
        """Jails that wait for a user, and those on their way to."""
        return sum(version.waiting for version in self._versions.values())

    def hold_back(self, held_back: bool) -> None:
        """While held back, nothing is kept ready, and what is parked ends; instances start all the same."""
        if held_back != self._held_back:
            self._held_back = held_back
            self._changed()

    # --- background --------------------------------------------------------------------------------------

    async def reconcile(self) -> None:
        """One pass. What takes time goes on in tasks, which the next pass counts."""
        now = self._clock()
        spare = self._reservations.capacity - self._reservations.total(now)
        if self._held_back:
            spare = Resources()
        for name, version in list(self._versions.items()):
            self._forget_ended(version)
            self._keep_zygote(name, version, spare, now)
        demands = self._demands()
        for name, change in pool.decide(demands, spare, now).items():
            version = self._versions[name]
            at_once = pool.at_once(demands[name], now) if now >= version.park_after else 0
            for _ in range(min(change, at_once - version.parking)):
                version.parking += 1
                self._do(f"park {name}", self._park(version))
            for jail in _pop(-change, version.cold, version.warm):
                self._do(f"end a parked jail of {name}", self._end(jail))
        for name, version in list(self._versions.items()):
            self._keep_warm(name, version, now)
            quiet = not version.demand.starts or now - version.demand.starts[-1] > ZYGOTE_QUIET
            if quiet and not (version.waiting or version.zygote or version.preparing):
                del self._versions[name]
        for jail_id in list(self._trash):
            with suppress(RoostError):  # a zygote's stays while instances of it live
                await self._jails.discard(jail_id)
                self._trash.discard(jail_id)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _demands(self) -> dict[str, pool.Demand]:
        return {
            name: v.demand_now
            for name, v in self._versions.items()
            if parks(v.agent.policy) and (v.live_zygote or v.waiting)
        }

    def _keep_warm(self, name: str, version: _Version, now: float) -> None:
        if version.not_warmed >= _FAILURES:
            return
        warm = len(version.warm) + version.warming
        demand = version.demand_now
        count = pool.to_warm(demand, warm, len(version.cold), now)
        for jail in _pop(min(count, pool.at_once(demand, now) - version.warming), version.cold):
            version.warming += 1
            self._do(f"warm {name}", self._warm(version, jail))

    def _keep_zygote(self, name: str, version: _Version, spare: Resources, now: float) -> None:
        if version.zygote is not None and version.zygote.ended:
            log.warning("the zygote of %s has ended", name)
            self._trash.add(version.zygote.jail_id)
            version.zygote = None
            self._failed(version, now)
        last = version.demand.starts[-1] if version.demand.starts else 0.0
        wanted = version.start is not Start.EXEC and now - last < ZYGOTE_QUIET
        if version.zygote is not None and not wanted:
            zygote, version.zygote = version.zygote, None
            self._do(f"end the zygote of {name}", self._end_zygote(zygote))
        elif (
            wanted
            and version.zygote is None
            and not version.preparing
            and version.failures < _FAILURES
            and now >= version.not_before
            and fits(version.demand.need, Resources(), spare)
        ):
            version.preparing = True
            self._do(f"zygote of {name}", self._prepare(name, version))

    def _failed(self, version: _Version, now: float) -> None:
        version.failures += 1
        version.not_before = now + _PAUSE

    async def _prepare(self, name: str, version: _Version) -> None:
        agent = version.agent
        jail_id = f"zygote-{name[:24]}-{uuid.uuid4().hex[:16]}"
        spec = of_zygote(jail_id, agent, self._reservations.capacity.memory_bytes, version.packages)
        began = self._clock()
        try:
            version.zygote = await self._jails.zygote(spec)
            log.info("the zygote of %s is ready after %.2f s", name, self._clock() - began)
        except RoostError as error:
            self._trash.add(jail_id)
            self._failed(version, self._clock())
            log.info("%s is started by executing it: %s", name, error.message)
        finally:
            version.preparing = False
            version.tried.set()
        self._changed()

    async def _park(self, version: _Version) -> None:
        run, network = version.agent.policy.run, version.agent.policy.network
        jail_id = f"{version.agent.policy.agent.name[:24]}-parked-{uuid.uuid4().hex[:24]}"
        try:
            zygote = version.live_zygote
            if zygote is None:
                return
            spec = of_instance(jail_id, version.agent, version.demand.need, version.packages, zygote.jail_id)
            jail = await self._jails.make(spec)
            try:
                await self._egress.prepare(jail, network)
                await jail.start()
                await wait_ready(jail, run.start_timeout)
                await _check_untouched(jail)
            except BaseException:
                await self._end(jail)
                raise
            version.cold.append(jail)
        except (RoostError, JailGone) as error:
            log.warning("a jail of %s can't be parked: %s", version.agent.version, error)
            self._trash.add(jail_id)
            version.park_after = self._clock() + _PAUSE
        finally:
            version.parking -= 1
        self._changed()

    async def _warm(self, version: _Version, jail: Jail) -> None:
        try:
            try:
                await jail.send(_WARM)
                await wait_ready(jail, version.agent.policy.run.start_timeout)
                await _check_untouched(jail)
            except BaseException:
                await self._end(jail)
                raise
            version.warm.append(jail)
            version.not_warmed = 0
        except (RoostError, JailGone) as error:
            version.not_warmed += 1
            over = "; they wait cold from now on" if version.not_warmed == _FAILURES else ""
            log.warning("a jail of %s can't be warmed up: %s%s", version.agent.version, error, over)
        finally:
            version.warming -= 1
        self._changed()

    def _forget_ended(self, version: _Version) -> None:
        version.cold, version.warm = self._alive(version.cold), self._alive(version.warm)

    def _alive(self, jails: list[Jail]) -> list[Jail]:
        alive = []
        for jail in jails:
            if jail.ended:
                self._trash.add(jail.jail_id)
            else:
                alive.append(jail)
        return alive

    async def _end(self, jail: Jail) -> None:
        await jail.kill()
        self._trash.add(jail.jail_id)

    async def _end_zygote(self, zygote: Zygote) -> None:
        await zygote.kill()
        self._trash.add(zygote.jail_id)

    def _do(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("%s failed", task.get_name(), exc_info=error)


def _pop(count: int, *lists: list[Jail]) -> Iterator[Jail]:
    """At most so many, of the first lists first."""
    for jails in lists:
        while count > 0 and jails:
            count -= 1
            yield jails.pop()


async def _check_untouched(jail: Jail) -> None:
    if await jail.files.scan():
        raise RoostError(Reason.JAIL_FAILED, "something wrote to the /state of a jail that waits")
