"""The jails of one jailer, and what is known of them: each act changes both, and `check` compares them.

Always compared: what should live answers, with the memory that it should have; what should be dead is gone;
nothing else is there: no process of the node's, no control group, no mount, no network namespace.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edge_agent.jail.api import JailGone, JailSpec, Zygote
from shared.errors import RoostError
from shared.resources import Resources
from tests.support.eventually import eventually
from tests.support.jailer import FILE_SERVICE, LIMITS, RunningJailer, alive, python, spec

# Answers with the number of messages so far, which it has on the disk as well.
COUNT = """
import os
n = int(open("/state/n").read()) if os.path.exists("/state/n") else 0
while True:
    recv(); n += 1
    with open("/state/new", "w") as file: file.write(str(n))
    os.replace("/state/new", "/state/n")
    send(str(n).encode())
"""
WAYS = ("exec", "fork", "task")
SIZES = (LIMITS, replace(LIMITS, memory_bytes=96 << 20), replace(LIMITS, cpu_millis=2000, pids=40))
VICTIMS = ("wright", "files", "daemon", "jailer", "zygote", "shell", "mounter", "init", "agent")
_PATIENCE = 20.0


@dataclass
class Life:
    """`jail`: a Jail, or a TaskJail if `way` is "task"."""

    jail: Any
    way: str
    zygote: Zygote | None = None
    started: bool = False
    frozen: bool = False

    @property
    def can_talk(self) -> bool:
        return self.way != "task" and self.started and not self.frozen


@dataclass
class Lives:
    """`said`: how many messages an instance has answered in all of its lives; of ids with a directory."""

    jailer: RunningJailer
    living: dict[str, Life] = field(default_factory=dict)
    said: dict[str, int] = field(default_factory=dict)
    zygote: Zygote | None = None
    made: int = 0
    descriptors: int = 0

    def begin(self) -> None:
        self.descriptors = _descriptors(self.jailer.process.pid)

    def new_id(self, kind: str) -> str:
        self.made += 1
        return f"{kind}-{self.made}"

    # --- acts ------------------------------------------------------------------------------------------

    async def make(self, way: str, jail_id: str) -> None:
        jails, zygote = self.jailer.jails, self.zygote
        if way == "task":
            jail: Any = await jails.task(spec(jail_id, ("sleep", "1000")))
        else:
            self.said.setdefault(jail_id, 0)
            wanted = spec(jail_id, python(COUNT))
            if way == "fork":
                assert zygote is not None
                wanted = JailSpec(jail_id, "v2", ("/none",), {}, LIMITS, zygote.jail_id)
            jail = await jails.make(wanted)
        self.living[jail_id] = Life(jail, way, zygote if way == "fork" else None)

    async def start(self, jail_id: str) -> None:
        life = self.living[jail_id]
        if life.way == "task":
            for fd in await life.jail.begin():
                os.close(fd)
        elif life.zygote is not None and life.zygote is not self.zygote:
            try:
                await life.jail.start()
            except RoostError:
                return
            raise AssertionError(f"{jail_id} was forked from a zygote that is gone")
        else:
            await life.jail.start()
        life.started = True

    async def talk(self, jail_id: str) -> None:
        jail = self.living[jail_id].jail
        self.said[jail_id] += 1
        async with asyncio.timeout(_PATIENCE):
            await jail.send(b".")
            assert int(await jail.receive()) == self.said[jail_id], jail_id

    async def freeze(self, jail_id: str) -> None:
        await self.living[jail_id].jail.freeze()
        self.living[jail_id].frozen = True

    async def thaw(self, jail_id: str) -> None:
        await self.living[jail_id].jail.thaw()
        self.living[jail_id].frozen = False

    async def resize(self, jail_id: str, limits: Resources) -> None:
        await self.living[jail_id].jail.resize(limits)
        assert self.living[jail_id].jail.limits == limits

    async def kill(self, jail_id: str) -> None:
        await self.living.pop(jail_id).jail.kill()
        assert jail_id not in self._groups(), "it is gone when that is said"

    async def discard(self, jail_id: str) -> None:
        await self.jailer.jails.discard(jail_id)
        self.said.pop(jail_id, None)
        assert not (self.jailer.data_dir / "jails" / jail_id).exists()

    async def make_zygote(self, jail_id: str) -> None:
        self.zygote = await self.jailer.jails.zygote(self.jailer.zygote_spec(jail_id, "v2", COUNT))

    async def kill_zygote(self) -> None:
        assert self.zygote is not None
        zygote, self.zygote = self.zygote, None
        await zygote.kill()

    # --- deaths ------------------------------------------------------------------------------------------

    async def strike(self, victim: str, jail_id: str) -> None:
        """SIGKILL to `victim` (or that of `jail_id`), if there is one; and what follows."""
        if pids := self._hit(victim, jail_id):
            await self._after(victim, jail_id, pids, "")

    async def amid(
        self, act: Coroutine[Any, Any, None], jail_id: str, delay: float, victim: str, of: str
    ) -> None:
        """Begins `act` on `jail_id`, and after `delay` seconds strikes. Whether it was done or not, both is
        right. Then its jail is ended, if it lives: that must work, whatever it was that was broken off."""
        doing = asyncio.ensure_future(act)
        await asyncio.wait({doing}, timeout=delay)
        pids = self._hit(victim, of)
        await asyncio.wait({doing}, timeout=2 * _PATIENCE)
        assert doing.done(), "every request is answered"
        error = doing.exception()
        assert error is None or isinstance(error, RoostError | JailGone), repr(error)
        unsure = self.living.pop(jail_id, None)
        if unsure is not None and not (pids and victim in ("daemon", "jailer")):
            await unsure.jail.kill()
        if pids:
            await self._after(victim, of, pids, jail_id)
        if jail_id in self.said:
            self.said[jail_id] = self._on_disk(jail_id)

    def _hit(self, victim: str, jail_id: str) -> list[int]:
        pids = self._pids_of(victim, jail_id)
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return pids

    async def _after(self, victim: str, of: str, pids: list[int], unsure: str) -> None:
        life = self.living.get(of)
        if victim == "agent" and life is not None and life.frozen:  # v1: it dies when it is thawed
            with suppress(JailGone):
                await self.thaw(of)
        await eventually(lambda: not any(map(alive, pids)), _PATIENCE, f"the {victim} is dead")
        match victim:
            case "daemon":
                await self._new_daemon(unsure)
            case "jailer":
                await self._new_jailer()
            case "zygote":
                self.zygote = None
            case "files":
                for jail_id, served in list(self.living.items()):
                    if served.way == "fork":
                        await self._ended(jail_id, served, victim)
            case "init" | "agent" if life is not None:
                await self._ended(of, life, victim)

    async def _new_daemon(self, unsure: str) -> None:
        async with asyncio.timeout(_PATIENCE):
            await self.jailer.jails.closed()
        jails = await self.jailer.reconnect()
        self.zygote = None
        kept = {id: life for id, life in self.living.items() if life.way != "task"}
        adopted = {jail.jail_id: jail for jail in await jails.adopt()}
        if unsure in adopted:
            await adopted.pop(unsure).kill()
        assert set(adopted) == set(kept)
        self.living = {id: replace(life, jail=adopted[id]) for id, life in kept.items()}

    async def _new_jailer(self) -> None:
        async with asyncio.timeout(_PATIENCE):
            await self.jailer.jails.closed()
        await self.jailer.process.wait(_PATIENCE)
        await self.jailer.start()
        self.living.clear()
        self.zygote = None
        assert await self.jailer.jails.adopt() == []
        self.begin()

    async def _ended(self, jail_id: str, life: Life, victim: str) -> None:
        if life.way == "task" and victim == "agent":
            assert await life.jail.wait(_PATIENCE) == -signal.SIGKILL
            return
        del self.living[jail_id]
        await eventually(lambda: life.jail.ended, _PATIENCE, f"the end of {jail_id} is told")

    def _pids_of(self, victim: str, jail_id: str) -> list[int]:
        match victim:
            case "jailer":
                return [self.jailer.process.pid]
            case "daemon":
                return [self.jailer.daemon_pid]
            case "wright":
                wright = self.jailer.child_named("roost-wright")
                return [wright.pid] if wright else []
            case "files":
                files = self.jailer.child_named(FILE_SERVICE)
                return [files.pid] if files else []
            case "shell":
                return self.jailer.shells()[:1]
            case "mounter":
                return self._mounters()[:1]
            case "zygote":
                names = [name for name in self._groups() if name.startswith("zygote-")]
                return [pid for name in names for pid in self.jailer.members(name)][:1]
            case _:
                members = self.jailer.members(jail_id)
                return [pid for pid in members if _is_init(pid) == (victim == "init")][:1]

    # --- what must hold ------------------------------------------------------------------------------------

    async def check(self) -> None:
        for jail_id, life in self.living.items():
            assert not life.jail.ended, jail_id
            if life.can_talk:
                await self.talk(jail_id)
            else:
                await life.jail.files.scan()  # its init answers, frozen or not
        for jail_id in await self.jailer.jails.directories():
            assert jail_id in self.said or jail_id.startswith("zygote-"), jail_id
        await self._settles()
        assert not self._mounts()

    async def end(self) -> None:
        """Ends all, after which all is as in the beginning."""
        for jail_id in list(self.living):
            await self.kill(jail_id)
        if self.zygote is not None:
            await self.kill_zygote()
        await self._settles()  # a shell that still ends needs the uid of its zygote
        jails = self.jailer.jails
        for jail_id in await jails.directories():
            await jails.discard(jail_id)
        assert not os.listdir(self.jailer.data_dir / "jails")
        await self._settles()
        await eventually(
            lambda: (
                _descriptors(self.jailer.process.pid) - len(self._pids_of("files", "")) == self.descriptors
            ),
            _PATIENCE,
            "no descriptor but the file service's socket",
        )

    async def _settles(self) -> None:
        """Until what lives is there, and nothing else; some of that takes a moment."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _PATIENCE
        while wrong := self._what_is_wrong():
            assert loop.time() < deadline, wrong
            await asyncio.sleep(0.02)

    def _what_is_wrong(self) -> str:
        expected = set(self.living) | ({self.zygote.jail_id} if self.zygote else set())
        groups = self._groups()
        if groups != expected:
            return f"the control groups of {groups ^ expected}"
        shells, mounters = self.jailer.shells(), self._mounters()
        if len(shells) != len(mounters) or len(shells) > (self.zygote is not None):
            return f"shells {shells} with mounters {mounters}"
        known = {pid for name in expected for pid in self.jailer.members(name)} | set(shells)
        networks = {_network(pid) for pid in known}
        strangers = [
            pid for pid in self.jailer.jailed() if pid not in known and _network(pid) not in networks
        ]
        return f"processes {strangers}" if any(map(alive, strangers)) else ""

    def _mounters(self) -> list[int]:
        """Those that work on a shell, or wait until it becomes a jail."""
        known = {self.jailer.process.pid, *self._pids_of("wright", "")}
        return [pid for pid in self.jailer.forked_only() if pid not in known and not _is_init(pid)]

    def _groups(self) -> set[str]:
        return {path.name for path in self.jailer.cgroups()}

    def _mounts(self) -> list[str]:
        data = str(self.jailer.data_dir)
        return [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if data in line]

    def _on_disk(self, jail_id: str) -> int:
        file = self.jailer.data_dir / "jails" / jail_id / "state" / "n"
        return int(file.read_text()) if file.exists() else 0


def _descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def _is_init(pid: int) -> bool:
    """Is it process 1 of a namespace below?"""
    with suppress(OSError):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return next(line for line in lines if line.startswith("NSpid:")).split()[2:] == ["1"]
    return False


def _network(pid: int) -> str:
    with suppress(OSError):
        return os.readlink(f"/proc/{pid}/ns/net")
    return ""
