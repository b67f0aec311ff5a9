"""The probe of tests/jail/probe in a jail, and what it should not find: canaries on the host."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from edge_agent.jail.python import base_interpreter
from shared.resources import Resources
from tests.support.jailer import running_jailer, spec

PROBE = Path(__file__).parents[1] / "jail" / "probe"
Report = dict[str, tuple[bool, str]]

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
        memory = _libc.shmget(_SHM_KEY, 4096, _IPC_CREAT | 0o666)
        stack.callback(_libc.shmctl, memory, _IPC_RMID, None)
        yield {
            "PROBE_ABSTRACT": name,
            "PROBE_PORT": str(port.getsockname()[1]),
            "PROBE_SOCKET": str(directory / "engine.sock"),
            "PROBE_FILE": str(file),
            "PROBE_PID": str(process.pid),
            "PROBE_SHM": str(_SHM_KEY),
        }
        assert process.poll() is None, "the canary on the host was killed"
        assert file.read_text() == "alive"


async def probe_in_jail(environment: dict[str, str]) -> Report:
    """What the probe says in a jail of a jailer of its own, beside a neighbour."""
    limits = Resources(memory_bytes=128 << 20, cpu_millis=2000, pids=32)
    async with running_jailer() as jailer:
        jailer.bundle("probe", {f"probe/{file.name}": file.read_text() for file in PROBE.glob("*.py")})
        neighbour = await jailer.jails.make(spec("neighbour", ("/bin/sleep", "600")))
        await neighbour.start()
        secret = jailer.data_dir / "jails/neighbour/state/secret"
        secret.write_text("secret")
        made = spec(
            "probe",
            (base_interpreter(), "-B", "-m", "probe"),
            limits,
            **environment,
            PROBE_NEIGHBOUR=str(secret),
        )
        jail = await jailer.jails.make(type(made)(made.jail_id, "probe", made.argv, made.env, made.limits))
        await jail.start()
        async with asyncio.timeout(_SECONDS):
            report: Report = json.loads(await jail.receive())
        assert secret.read_text() == "secret"
        return report
