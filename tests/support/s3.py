"""A private S3-compatible server, `rclone serve s3`, owned by a scope: it ends with the block.

An object lies as a file at DIRECTORY/BUCKET/KEY, where a test can harm it.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from tests.support.etcd import free_ports
from tests.support.eventually import eventually
from tests.support.process import Child

_BUCKET, _PREFIX = "roost", "mesh"
_KEY, _SECRET = "an-access-key", "a-secret-key"


class S3(Child):
    """After `kill`, `start` brings it back at the same address, with its data."""

    url = f"s3://{_BUCKET}/{_PREFIX}"

    def __init__(self, directory: Path) -> None:
        self._port = free_ports(1)[0]
        data = directory / "data"
        self.objects = data / _BUCKET / _PREFIX
        (data / _BUCKET).mkdir(parents=True)
        rclone = str(Path(sys.executable).with_name("rclone"))
        super().__init__(
            [
                *(rclone, "serve", "s3", str(data)),
                *("--addr", f"127.0.0.1:{self._port}", "--auth-key", f"{_KEY},{_SECRET}"),
                *("--config", "/dev/null", "--dir-cache-time", "1ms"),  # it must see what tests do behind it
            ],
            directory / "rclone.log",
        )
        # As the AWS tools want it.
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._port}",
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": _KEY,
            "AWS_SECRET_ACCESS_KEY": _SECRET,
            "AWS_REGION": "here",
        }

    async def start(self) -> None:
        await super().start()
        await eventually(self._listens, 20.0, "rclone serve s3")

    def chunks(self) -> list[Path]:
        return [path for path in self.objects.rglob("chunks*/*/*") if path.is_file()]

    def _listens(self) -> bool:
        assert self.running, self.log()
        with socket.socket() as s:
            return s.connect_ex(("127.0.0.1", self._port)) == 0


@asynccontextmanager
async def running_s3(directory: Path) -> AsyncIterator[S3]:
    """One with its data in `directory`, which is made."""
    server = S3(directory)
    try:
        await server.start()
        yield server
    finally:
        await server.kill()
