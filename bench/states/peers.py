"""borg, which takes snapshots of the same files into chunks of the same kind, and nothing else: no etcd, no
fence, no reply."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from pathlib import Path

_SECONDS = 300.0


class Borg:
    """A repository in `directory`; its cache too. `compression` none, as the files are random."""

    def __init__(self, directory: Path) -> None:
        self._repository = directory / "repository"
        self._environment = {
            **os.environ,
            "BORG_BASE_DIR": str(directory),
            "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes",
        }
        self._made = 0

    @staticmethod
    def there() -> bool:
        return shutil.which("borg") is not None

    async def init(self) -> None:
        self._repository.parent.mkdir()
        await self._run("init", "--encryption", "none", str(self._repository))

    async def snapshot(self, files: Path) -> float:
        """Seconds for a new archive of `files`."""
        self._made += 1
        began = time.perf_counter()
        await self._run("create", f"{self._repository}::{self._made}", str(files))
        return time.perf_counter() - began

    async def _run(self, *arguments: str) -> None:
        process = await asyncio.create_subprocess_exec(
            "setpriv", "--pdeathsig", "KILL", "--", "borg", *arguments,
            env=self._environment, stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        async with asyncio.timeout(_SECONDS):
            output, _ = await process.communicate()
        if process.returncode != 0:
            raise RuntimeError(f"borg {arguments[0]}: {output.decode()[-500:]}")


def write(files: Path, first: int, count: int, size: int) -> None:
    """As the agent does it."""
    files.mkdir(exist_ok=True)
    for number in range(first, first + count):
        (files / f"{number:06}").write_bytes(os.urandom(size))
