"""The probe of tests/jail/probe in a jail, and what it should not find: canaries on the host."""

from __future__ import annotations

import ctypes
import json
import os
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from edge_agent.control import Agent
from edge_agent.starts import Starts
from edge_agent.turns import Deltas, Turn, run_turn
from tests.support.calls import no_calls
from tests.support.jailer import RunningJailer, running_jailer, spec
from tests.support.starting import WAYS, start_by, starts_of
from tests.support.tasks import no_tasks

PROBE = Path(__file__).parents[1] / "jail" / "probe"
Report = dict[str, tuple[bool, str]]
_PROBER = """
import json, os
from probe.__main__ import report
from roost import Agent
agent = Agent()

@agent.turn
def probe(turn):
    os.environ.update(json.loads(turn.message))
    return json.dumps(report())
"""
_POLICY = """
[agent]
name = "probe"
[run]
entry = "prober:agent"
start = "{start}"
[resources]
memory = "128M"
cpu = 2.0
pids = 32
"""

NOBODY = 65534  # who runs the canary process, and those sandboxes that need no root
_SECONDS = 100.0
_SHM_KEY, _IPC_CREAT, _IPC_RMID = 0x52_6F_6F_73, 0o1000, 0
_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def canaries(directory: Path) -> Iterator[dict[str, str]]:
    """Things on the host, open to any user, and where they are, as the probe's environment. `directory`
    must be one that everybody can enter."""
    file = directory / "canary"
    file.write_text("alive")
    file.chmod(0o644)
    with ExitStack() as stack:
        abstract, port, unix = (
            stack.enter_context(socket.socket(family))
            for family in (socket.AF_UNIX, socket.AF_INET, socket.AF_UNIX)
        )
        name = f"roost-canary-{os.getpid()}"
        abstract.bind("\0" + name)
        port.bind(("127.0.0.1", 0))
        unix.bind(str(directory / "engine.sock"))
        (directory / "engine.sock").chmod(0o666)
        for listener in (abstract, port, unix):
            listener.listen()
        process = subprocess.Popen(
            ["sleep", "600"], env={"PROBE_CANARY": "1"}, user=NOBODY, group=NOBODY, extra_groups=[]
        )
        stack.callback(process.wait)
        stack.callback(process.kill)
        os.environ["HOST_SECRET"] = "secret"
        stack.callback(os.environ.pop, "HOST_SECRET")
        shared = [Path(f"/dev/shm/{name}"), Path(f"/tmp/{name}")]
        for path in shared:
            path.write_text("alive")
            path.chmod(0o644)
            stack.callback(path.unlink)
        memory = _libc.shmget(_SHM_KEY, 4096, _IPC_CREAT | 0o666)
        stack.callback(_libc.shmctl, memory, _IPC_RMID, None)
        yield {
            "PROBE_ABSTRACT": name,
            "PROBE_PORT": str(port.getsockname()[1]),
            "PROBE_SOCKET": str(directory / "engine.sock"),
            "PROBE_FILE": str(file),
            "PROBE_PID": str(process.pid),
            "PROBE_SHM": str(_SHM_KEY),
            "PROBE_SHARED": ":".join(map(str, shared)),
        }
        assert process.poll() is None, "the canary on the host was killed"
        assert file.read_text() == "alive"


async def probe_in_jails(environment: dict[str, str], ways: Sequence[str] = WAYS) -> dict[str, Report]:
    """What the probe says in a jail of each of `ways` to start, as a node's daemon starts it; all of one
    jailer, beside a neighbour."""
    async with running_jailer() as jailer:
        files = {f"probe/{file.name}": file.read_text() for file in PROBE.glob("*.py")}
        jailer.bundle("probe", {**files, "prober.py": _PROBER})
        neighbour = await jailer.jails.make(spec("neighbour", ("/bin/sleep", "600")))
        await neighbour.start()
        secret = jailer.data_dir / "jails/neighbour/state/secret"
        secret.write_text("secret")
        planted = {
            **environment,
            "PROBE_NEIGHBOUR": str(secret),
            "PROBE_NEIGHBOUR_PID": str(max(jailer.members("neighbour"))),
        }
        reports = {}
        for way in ways:
            async with starts_of(jailer) as starts:
                reports[way] = await _probe(jailer, starts, way, planted)
        assert secret.read_text() == "secret"
        return reports


async def _probe(jailer: RunningJailer, starts: Starts, way: str, planted: dict[str, str]) -> Report:
    agent = Agent.of("probe", _POLICY.format(start=way), "")
    jail = await start_by(jailer, starts, agent, way)
    turn = Turn("1", "user", json.dumps(planted))
    report: Report = json.loads(await run_turn(jail, turn, Deltas(), no_tasks(), no_calls(), _SECONDS))
    await jail.kill()
    return report
