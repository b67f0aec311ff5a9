"""A private, real etcd, owned by a scope: it ends with the block, or with this process at the latest."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from tests.support.eventually import eventually

# How a child's command line starts: it is killed when the thread that made it ends. Not by preexec_fn, which
# makes Python fork with its handlers: gRPC's can bring the child down when another thread is in gRPC.
DYING_WITH_PARENT = ("setpriv", "--pdeathsig", "KILL", "--")


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago; distinct."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


class Etcd:
    """One etcd process on this machine. After `stop` or `kill`, `start` brings it back with its data."""

    def __init__(self, directory: Path, name: str = "default") -> None:
        self.name = name
        self._directory = directory
        client, peer = free_ports(2)
        self.endpoint = f"127.0.0.1:{client}"
        self._peer = f"127.0.0.1:{peer}"
        self._cluster = [self]
        self._process: asyncio.subprocess.Process | None = None

    def join(self, cluster: list[Etcd]) -> None:
        """Makes it a member of a cluster of these. Before its first start."""
        self._cluster = cluster

    async def start(self) -> None:
        """Returns when it answers, for which a cluster needs more than half of its members."""
        await self.launch()
        await eventually(self._answers, 10.0, f"etcd at {self.endpoint}")

    async def launch(self) -> None:
        """Starts it, and waits for nothing."""
        client, peer = f"http://{self.endpoint}", f"http://{self._peer}"
        members = ",".join(f"{member.name}=http://{member._peer}" for member in self._cluster)
        with (self._directory / "etcd.log").open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *DYING_WITH_PARENT,
                "etcd",
                *("--name", self.name),
                *("--data-dir", str(self._directory / "data")),
                *("--listen-client-urls", client, "--advertise-client-urls", client),
                *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
                *("--initial-cluster", members),
                # Leases may be no shorter than 1.5 elections; tests want 1 s.
                *("--heartbeat-interval", "50", "--election-timeout", "500"),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                process_group=0,  # Ctrl-C is for the test, which ends it
            )

    async def stop(self, number: int = signal.SIGTERM) -> None:
        """Ends it; it is gone on return. One that ignores the signal for 5 s is killed."""
        if self._process is None or self._process.returncode is not None:
            return
        self.resume()
        self._process.send_signal(number)
        try:
            async with asyncio.timeout(5.0):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()

    async def restart(self) -> None:
        await self.stop(signal.SIGKILL)
        await self.start()

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    def suspend(self) -> None:
        """From now on it neither answers nor refuses."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    async def compact(self, revision: int) -> None:
        code, output = await self._ctl("compact", str(revision))
        assert code == 0, output

    async def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.returncode is None, (self._directory / "etcd.log").read_text()[-2000:]
        return (await self._ctl("endpoint", "health"))[0] == 0

    async def _ctl(self, *arguments: str) -> tuple[int, str]:
        process = await asyncio.create_subprocess_exec(
            *DYING_WITH_PARENT,
            *("etcdctl", "--endpoints", self.endpoint, "--dial-timeout", "1s", "--command-timeout", "1s"),
            *arguments,
            env={"ETCDCTL_API": "3", "PATH": "/usr/bin:/bin:/usr/local/bin"},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output, _ = await process.communicate()
        return process.returncode or 0, output.decode()

    def _signal(self, number: int) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(number)


@asynccontextmanager
async def running_etcd(directory: Path) -> AsyncIterator[Etcd]:
    """An etcd with its data in `directory`, which must exist."""
    etcd = Etcd(directory)
    try:
        await etcd.start()
        yield etcd
    finally:
        await etcd.stop(signal.SIGKILL)


@asynccontextmanager
async def running_cluster(directory: Path, members: int) -> AsyncIterator[list[Etcd]]:
    """Some etcds that are one, each with its data in a directory of its own beneath `directory`."""
    cluster = [Etcd(directory / f"etcd{i}", f"etcd{i}") for i in range(members)]
    try:
        for member in cluster:
            (directory / member.name).mkdir(parents=True)
            member.join(cluster)
        await asyncio.gather(*(member.start() for member in cluster))
        yield cluster
    finally:
        await asyncio.gather(*(member.stop(signal.SIGKILL) for member in cluster))
