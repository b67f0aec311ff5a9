"""The packages that agents bring along: prepared once for a version, in a jail, and read by all of its jails.

What must hold: a version's packages are complete whenever this says so, since they are noted only after all
of them are on the disk; what a crash left behind is in nobody's notes and goes at the next start. Nothing of
a tenant's is unpacked by the daemon itself. How it can fail: AGENT_PREPARE_FAILED names what is to blame.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import os
import sys
import uuid
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from edge_agent.control import Agent
from edge_agent.jail import unpack
from edge_agent.jail.api import Exit, Jail, JailGone, Jails, JailSpec
from edge_agent.jail.python import base_interpreter
from shared.errors import RoostError
from shared.resources import Disk, Resources
from shared.wheels import VENDORED, VENV, WHEELS, Platform, choose, prepare_failed

log = logging.getLogger(__name__)

PREPARE_SECONDS = 300.0
_LIMITS = Resources(memory_bytes=512 << 20, cpu_millis=1000, pids=16)
_DISK = Disk(state_bytes=2 * unpack.MAX_BYTES)  # what is compiled comes on top
_NEW = ".new"

Tell = Callable[[str], None]


@dataclass(slots=True)
class _Work:
    """On one version. `listeners` wait for it and are told how far it is."""

    listeners: list[Tell] = field(default_factory=list)
    task: asyncio.Task[str] | None = None

    def tell(self, text: str) -> None:
        for listener in self.listeners:
            listener(text)


class Packages:
    """`bundles` has the agents' files, by version. In `notes`, which is made if need be, is for each version
    that was prepared a file with the id of the jail whose directory holds its packages."""

    def __init__(self, jails: Jails, bundles: Path, notes: Path) -> None:
        self._jails = jails
        self._bundles = bundles
        self._notes = notes
        self._work: dict[str, _Work] = {}
        self._one_at_a_time = asyncio.Lock()  # it takes a core, and users have the first call on the others
        notes.mkdir(parents=True, exist_ok=True)
        self._ready = {
            path.name: path.read_text() for path in notes.iterdir() if not path.name.endswith(_NEW)
        }

    def recover(self, directories: Collection[str]) -> set[str]:
        """At the start: the ids of those among `directories` that are needed on. A version whose bundle is
        gone needs none."""
        for version, jail_id in list(self._ready.items()):
            if jail_id not in directories or not (self._bundles / version).is_dir():
                del self._ready[version]
                (self._notes / version).unlink(missing_ok=True)
        return set(self._ready.values())

    async def ensure(self, agent: Agent, tell: Tell) -> str:
        """The id of the jail whose directory holds the packages of this agent, whose files are here; empty if
        it brings none. Concurrent calls share the work, which goes on when a caller is cancelled."""
        version = agent.version
        ready = self._ready.get(version)
        if ready is not None:
            return ready
        bundle = self._bundles / version
        if not any((bundle / name).is_dir() for name in (WHEELS, VENDORED, VENV)):
            self._ready[version] = ""
            return ""
        work = self._work.get(version)
        if work is None:
            work = self._work[version] = _Work()
            work.task = asyncio.create_task(self._prepare(agent, bundle, work), name=f"packages {version}")
            work.task.add_done_callback(lambda done: self._done(version, done))
        assert work.task is not None
        work.listeners.append(tell)
        try:
            return await asyncio.shield(work.task)
        finally:
            work.listeners.remove(tell)

    async def close(self) -> None:
        """Cancels what is being prepared and waits for it to end."""
        tasks = [work.task for work in self._work.values() if work.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _done(self, version: str, task: asyncio.Task[str]) -> None:
        del self._work[version]
        if not task.cancelled():
            task.exception()  # each caller that still waits has it; if none does, nobody asks any more

    async def _prepare(self, agent: Agent, bundle: Path, work: _Work) -> str:
        version = agent.version
        what = await asyncio.to_thread(_look, bundle)
        if not any(what.values()):
            self._ready[version] = ""
            return ""
        name = f"{agent.policy.agent.name} {version[:12]}"
        jail_id = f"packages-{version[:24]}-{uuid.uuid4().hex[:16]}"
        if self._one_at_a_time.locked():
            work.tell(f"preparing {name}: another agent comes first")
        async with self._one_at_a_time:
            try:
                async with asyncio.timeout(PREPARE_SECONDS):
                    await self._unpack(jail_id, version, name, what, work)
                    await asyncio.to_thread(self._note, version, jail_id)
            except BaseException as error:
                with suppress(RoostError):  # then the next start of the node removes it
                    await self._jails.discard(jail_id)
                if isinstance(error, TimeoutError):
                    raise prepare_failed(
                        f"the packages of {name} could not be prepared within {PREPARE_SECONDS:g} s",
                        "is this node overloaded? else bring fewer or smaller packages",
                    ) from error
                raise
        self._ready[version] = jail_id
        log.info("the packages of %s are prepared", name)
        return jail_id

    async def _unpack(
        self, jail_id: str, version: str, name: str, what: dict[str, list[str]], work: _Work
    ) -> None:
        """Returns when the packages are on the disk, and nothing runs that could still change them."""
        argv = (base_interpreter(), "-I", "-B", "-c", inspect.getsource(unpack))
        jail = await self._jails.make(JailSpec(jail_id, version, argv, limits=_LIMITS, disk=_DISK))
        try:
            await jail.start()
            await jail.send(json.dumps(what).encode())
            await self._follow(jail, name, work)
        except JailGone as gone:
            raise prepare_failed(
                f"unpacking the packages of {name} ended early: {_why(gone.exit)}", "see the node's log"
            ) from gone
        finally:
            await jail.kill()

    async def _follow(self, jail: Jail, name: str, work: _Work) -> None:
        while True:
            match json.loads(await jail.receive()):
                case {"kind": "progress", "text": str(text)}:
                    log.info("preparing %s: %s", name, text)
                    work.tell(f"preparing {name}: {text}")
                case {"kind": "done"}:
                    return
                case {"kind": "failed", "message": str(message)}:
                    raise prepare_failed(f"the packages of {name} can't be unpacked: {message[:1000]}")
                case _:
                    raise prepare_failed(f"unpacking the packages of {name} failed by a bug")

    def _note(self, version: str, jail_id: str) -> None:
        """Durably, after what it names."""
        new = self._notes / f"{version}{_NEW}"
        with new.open("w") as file:
            file.write(jail_id)
            file.flush()
            os.fsync(file.fileno())
        new.rename(self._notes / version)


def _why(exit: Exit) -> str:
    if exit.out_of_memory:
        return "it ran out of memory"
    if exit.disk_full:
        return "it took too much of the disk"
    lines = exit.stderr_tail.strip().splitlines()
    return lines[-1][:500] if lines else f"exit code {exit.code}"


def _look(bundle: Path) -> dict[str, list[str]]:
    """What there is to copy and to unpack, as paths in a jail. The bundle's names are its tenant's choice."""
    here = Platform.here()
    trees: list[str] = []
    inside = f"{VENV}/lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    if (bundle / VENV / "pyvenv.cfg").is_file():
        if not (bundle / inside).is_dir():
            raise prepare_failed(
                f"the agent's {VENV}/ holds no {inside.removeprefix(VENV + '/')}",
                f"make it with Python {sys.version_info.major}.{sys.version_info.minor}, as this node has",
            )
        trees.append(f"/agent/{inside}")
    if (bundle / VENDORED).is_dir():
        trees.append(f"/agent/{VENDORED}")
    wheels: list[str] = []
    if (bundle / WHEELS).is_dir():
        files = {"": _names(bundle / WHEELS, is_directory=False)}
        for directory in _names(bundle / WHEELS, is_directory=True):
            files[directory] = _names(bundle / WHEELS / directory, is_directory=False)
        wheels = [f"/agent/{WHEELS}/{file}" for file in choose(files, here)]
    return {"trees": trees, "wheels": wheels}


def _names(directory: Path, is_directory: bool) -> list[str]:
    with os.scandir(directory) as items:
        return sorted(i.name for i in items if i.is_dir(follow_symlinks=False) == is_directory)
