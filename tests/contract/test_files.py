"""What every `Files` promises: here over a plain directory; the jail's own is held to it in tests/jail."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_agent.state.files import Entry, Files, Kind
from edge_agent.state.local_files import LocalFiles
from edge_agent.state.tree import MAX_DEPTH, MAX_OPENED, TEMPORARY
from shared.errors import Reason, RoostError

ODD = b"\xff\xfe \n'\"\\".decode(sys.getfilesystemencoding(), "surrogateescape")


class FilesContract:
    """Subclasses give the fixtures: `files`, and `root`, the directory behind it."""

    async def test_a_scan_lists_everything_sorted_and_parents_first(self, files: Files, root: Path) -> None:
        (root / "b").mkdir(mode=0o750)
        (root / "b" / ODD).write_bytes(b"123")
        (root / "b-").write_bytes(b"")
        (root / "a").symlink_to("/etc/passwd")
        entries = await files.scan()
        assert [(e.path, e.kind, e.size) for e in entries] == [
            ("a", Kind.LINK, 0),
            ("b", Kind.DIR, 0),
            ("b-", Kind.FILE, 0),
            (f"b/{ODD}", Kind.FILE, 3),
        ]
        assert entries[0].target == "/etc/passwd"
        assert entries[1].mode == 0o750
        status = (root / "b" / ODD).stat()
        assert entries[3].mtime_ns == status.st_mtime_ns
        assert entries[3].ctime_ns == status.st_ctime_ns
        assert entries[3].inode == status.st_ino

    async def test_what_was_changed_since_comes_with_descriptors_of_a_few(
        self, files: Files, root: Path
    ) -> None:
        (root / "old").write_bytes(b"old")
        (root / "dir").mkdir()
        entries = await files.scan()
        since = max(entry.ctime_ns for entry in entries) + 1
        found, opened = await files.changed(since)
        assert (found, opened) == (entries, {})
        await asyncio.sleep(0.02)  # the clock's tick, by which files are stamped
        for number in range(3 * MAX_OPENED):
            (root / "dir" / f"{number:02}").write_bytes(b"%d" % number)
        (root / "dir" / "link").symlink_to("00")
        found, opened = await files.changed(since)
        assert found == await files.scan()
        assert list(opened) == [f"dir/{number:02}" for number in range(MAX_OPENED)]
        for number, fd in enumerate(opened.values()):
            assert os.read(fd, 10) == b"%d" % number
            os.close(fd)

    async def test_a_scan_leaves_out_what_is_no_file(self, files: Files, root: Path) -> None:
        os.mkfifo(root / "fifo")
        with socket.socket(socket.AF_UNIX) as s:
            s.bind(str(root / "socket"))
            assert await files.scan() == []

    async def test_a_scan_goes_into_a_directory_that_its_owner_may_not_read(
        self, files: Files, root: Path
    ) -> None:
        (root / "shut").mkdir()
        (root / "shut" / "in").write_bytes(b"x")
        (root / "shut").chmod(0)
        assert (await files.scan())[0] == Entry("shut", Kind.DIR, 0)
        assert [e.path for e in await files.scan()] == ["shut", "shut/in"]

    async def test_too_deep_a_tree_is_refused(self, files: Files, root: Path) -> None:
        deep = root.joinpath(*["d"] * (MAX_DEPTH - 1))
        deep.mkdir(parents=True)
        assert len(await files.scan()) == MAX_DEPTH - 1
        (deep / "d").mkdir()
        with pytest.raises(RoostError) as caught:
            await files.scan()
        assert caught.value.reason is Reason.STATE_TOO_LARGE

    async def test_writing_a_file(self, files: Files, root: Path) -> None:
        fd = await files.open_write(ODD)
        os.write(fd, b"hello")
        os.close(fd)
        assert not (root / ODD).exists()
        made = await files.commit_write(Entry(ODD, Kind.FILE, 0o4640, mtime_ns=1_500_000_000_123_456_789))
        assert (root / ODD).read_bytes() == b"hello"
        assert made.mode == 0o640
        assert made.size == 5
        assert made.mtime_ns == 1_500_000_000_123_456_789
        assert await files.scan() == [made]

    async def test_a_file_may_be_committed_before_its_descriptor_is_closed(
        self, files: Files, root: Path
    ) -> None:
        fd = await files.open_write("a")
        os.write(fd, b"x")
        await files.commit_write(Entry("a", Kind.FILE, 0o600))
        os.close(fd)
        assert (root / "a").read_bytes() == b"x"

    async def test_more_is_written_to_a_file_in_its_place_whatever_becomes_of_its_name(
        self, files: Files, root: Path
    ) -> None:
        fd = await files.open_write("a")
        os.ftruncate(fd, 10)
        placed = await files.commit_write(Entry("a", Kind.FILE, 0o600, mtime_ns=5_000_000_000), more=True)
        assert await files.scan() == [placed]
        os.write(fd, b"01234")
        assert (await files.written("a", 6_000_000_000, more=True)).mtime_ns == 6_000_000_000
        (root / "a").rename(root / "b")
        os.write(fd, b"56789")
        made = await files.written("a", 7_000_000_000, more=False)
        os.close(fd)
        assert (root / "b").read_bytes() == b"0123456789"
        (found,) = await files.scan()
        assert (found.mtime_ns, found.size, found.inode) == (7_000_000_000, 10, placed.inode)
        assert (made.ctime_ns, made.inode) == (found.ctime_ns, found.inode)
        with pytest.raises(ValueError, match="not being written"):
            await files.written("a", 0, more=False)

    @pytest.mark.parametrize("there", ["file", "dir", "link", "nothing"])
    async def test_a_write_replaces_what_is_there(self, files: Files, root: Path, there: str) -> None:
        _put(root, there)
        os.close(await files.open_write("x"))
        await files.commit_write(Entry("x", Kind.FILE, 0o600))
        assert [(e.path, e.kind, e.size) for e in await files.scan()] == [("x", Kind.FILE, 0)]

    @pytest.mark.parametrize("there", ["file", "dir", "link", "nothing"])
    async def test_a_link_replaces_what_is_there(self, files: Files, root: Path, there: str) -> None:
        _put(root, there)
        await files.make_link(Entry("x", Kind.LINK, 0o777, target=f"../{ODD}"))
        assert await files.scan() == [Entry("x", Kind.LINK, 0o777, target=f"../{ODD}")]

    @pytest.mark.parametrize("there", ["file", "dir", "link", "nothing"])
    async def test_a_directory_replaces_what_is_there(self, files: Files, root: Path, there: str) -> None:
        _put(root, there)
        await files.make_dir(Entry("x", Kind.DIR, 0o1700))
        assert (await files.scan())[0] == Entry("x", Kind.DIR, 0o700)
        assert (root / "x" / "in").exists() == (there == "dir"), "an existing directory is kept"

    @pytest.mark.parametrize("there", ["file", "dir", "link", "nothing"])
    async def test_removing(self, files: Files, root: Path, there: str) -> None:
        _put(root, there)
        await files.remove("x")
        await files.remove("x/y/z")
        assert await files.scan() == []

    async def test_an_unfinished_write_is_never_seen(self, files: Files, root: Path) -> None:
        os.close(await files.open_write("a"))
        (root / f"{TEMPORARY}left").mkdir()
        assert await files.scan() == []
        assert os.listdir(root) == []

    async def test_no_call_follows_a_link_out_of_the_tree(
        self, files: Files, root: Path, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        outside = tmp_path_factory.mktemp("outside")
        (outside / "secret").write_bytes(b"secret")
        (root / "out").symlink_to(outside)
        (root / "secret").symlink_to(outside / "secret")
        (root / "file").write_bytes(b"")
        for path in ("out/secret", "secret", "file/below"):
            with pytest.raises(FileNotFoundError):
                await files.open_read(path)
        with pytest.raises(FileNotFoundError):
            await files.open_write("out/new")
        with pytest.raises(FileNotFoundError):
            await files.make_dir(Entry("out/new", Kind.DIR, 0o700))
        with pytest.raises(FileNotFoundError):
            await files.make_link(Entry("out/new", Kind.LINK, 0o777, target="x"))
        await files.remove("out/secret")
        await files.remove("out")
        await files.remove("secret")
        await files.remove("file/below")
        assert [e.path for e in await files.scan()] == ["file"]
        assert [p.name for p in outside.iterdir()] == ["secret"]

    async def test_only_regular_files_are_read_and_none_blocks(self, files: Files, root: Path) -> None:
        os.mkfifo(root / "fifo")
        (root / "dir").mkdir()
        with socket.socket(socket.AF_UNIX) as s:
            s.bind(str(root / "socket"))
            for path in ("fifo", "dir", "socket", "missing", "missing/too"):
                with pytest.raises(FileNotFoundError):
                    await files.open_read(path)

    async def test_reading(self, files: Files, root: Path) -> None:
        (root / "a").write_bytes(b"hello")
        (root / "a").chmod(0)
        fd = await files.open_read("a")
        assert os.read(fd, 100) == b"hello"
        os.close(fd)

    @pytest.mark.parametrize(
        "path", ["", "/", "/a", "..", "a/../b", "a//b", "a/", "./a", "a\0", f"{TEMPORARY}a"]
    )
    async def test_a_path_that_no_tree_can_have_is_a_bug(self, files: Files, path: str) -> None:
        with pytest.raises(ValueError):
            await files.open_read(path)
        with pytest.raises(ValueError):
            await files.open_write(path)
        with pytest.raises(ValueError):
            await files.remove(path)


def _put(root: Path, kind: str) -> None:
    match kind:
        case "file":
            (root / "x").write_bytes(b"old")
        case "dir":
            (root / "x").mkdir()
            (root / "x" / "in").write_bytes(b"old")
            (root / "x" / "deeper").mkdir(mode=0)
        case "link":
            (root / "x").symlink_to("/")


class TestLocalFiles(FilesContract):
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        root = tmp_path / "root"
        root.mkdir()
        return root

    @pytest.fixture
    def files(self, root: Path) -> Iterator[Files]:
        with LocalFiles(root) as files:
            yield files

    async def test_what_is_made_belongs_to_the_owner(self, root: Path) -> None:
        with LocalFiles(root, owner=(12345, 23456)) as files:
            os.close(await files.open_write("f"))
            await files.commit_write(Entry("f", Kind.FILE, 0o600))
            await files.make_dir(Entry("d", Kind.DIR, 0o700))
            await files.make_link(Entry("l", Kind.LINK, 0o777, target="/etc/passwd"))
        for name in "fdl":
            status = (root / name).lstat()
            assert (status.st_uid, status.st_gid) == (12345, 23456)
        assert os.stat("/etc/passwd").st_uid == 0
