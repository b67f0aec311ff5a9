"""A jail's files keep what every `Files` promises."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from edge_agent.jail.api import Jail
from edge_agent.state.files import Entry, Files, Kind
from edge_agent.state.tree import MAX_ENTRIES
from shared.errors import Reason, RoostError
from tests.contract.test_files import FilesContract
from tests.support.jailer import ECHO, RunningJailer

_libc = ctypes.CDLL(None)


@dataclass(frozen=True)
class _Elsewhere:
    """Directories that the agent may write to, were it not jailed."""

    directory: Path

    def mktemp(self, name: str) -> Path:
        path = self.directory / name
        path.mkdir()
        return path


class TestRemoteFiles(FilesContract):
    @pytest.fixture(params=["exec", "zygote"])
    async def jail(self, jailer: RunningJailer, request: pytest.FixtureRequest) -> Jail:
        """Its own init serves its files, or the node's file service."""
        return await jailer.started(request.param, "a", ECHO)

    @pytest.fixture
    def tmp_path_factory(self, jailer: RunningJailer) -> _Elsewhere:
        return _Elsewhere(jailer.data_dir.parent / "elsewhere")

    @pytest.fixture
    def root(self, jailer: RunningJailer, jail: Jail, tmp_path_factory: _Elsewhere) -> Iterator[Path]:
        """The state, in which this thread makes files as if it were the agent."""
        root = jailer.data_dir / "jails/a/state"
        owner = root.stat().st_uid
        tmp_path_factory.directory.mkdir()
        os.chown(tmp_path_factory.directory, owner, owner)
        _libc.setfsgid(owner)
        _libc.setfsuid(owner)
        yield root
        _libc.setfsuid(0)
        _libc.setfsgid(0)

    @pytest.fixture
    def files(self, jail: Jail, root: Path) -> Files:
        return jail.files

    async def test_what_is_made_belongs_to_the_agent(self, files: Files, root: Path) -> None:
        os.close(await files.open_write("f"))
        await files.commit_write(Entry("f", Kind.FILE, 0o600))
        await files.make_dir(Entry("d", Kind.DIR, 0o700))
        await files.make_link(Entry("l", Kind.LINK, 0o777, target="/etc/passwd"))
        assert {_owner(root / name) for name in "fdl"} == {_owner(root)}

    async def test_a_scan_of_many_entries_comes_in_pages(self, files: Files, root: Path) -> None:
        for i in range(5000):
            (root / f"{i:05}-{'x' * 150}").touch()
        entries = await files.scan()
        assert [e.path[:5] for e in entries] == [f"{i:05}" for i in range(5000)]

    async def test_too_many_entries_are_refused(self, files: Files, root: Path) -> None:
        for i in range(MAX_ENTRIES // 1000):
            directory = root / str(i)
            directory.mkdir()
            (directory / "0").touch()
            for j in range(1, 1000):
                os.link(directory / "0", directory / str(j))
        with pytest.raises(RoostError) as refused:
            await files.scan()
        assert refused.value.reason is Reason.STATE_TOO_LARGE


def _owner(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_uid, status.st_gid
