"""Where blobs wait to be deleted: out of the way, but still to be read. `collecting/rounds.py` says why.

A blob rests at `chunks/<2 digits>/<hash>`; condemned in round n, at `trash/<n>-<token>/<hash>`, where the
token is that of one collector. What must hold: a blob is at one of the two at any time, until it is purged;
a collector's trash, once closed, takes nothing more (in a directory: it is renamed; an object store has no
way to refuse). How it can fail: OSError and obstore's errors.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import AsyncIterator, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from obstore.store import ObjectStore

from shared.content import is_hash

SHARDS = tuple(f"{n:02x}" for n in range(256))
_CLOSED = ".closed"


@dataclass(frozen=True, slots=True)
class Found:
    """A blob in `chunks/`. `modified` in seconds since 1970, by the store's clock."""

    hash: str
    size: int
    modified: float


@dataclass(frozen=True, slots=True)
class Condemned:
    hash: str
    round: int
    size: int
    place: str  # its name in the store


class Trash:
    """Of an obstore `store`; `directory` is where it lies if it is one of this machine's."""

    def __init__(self, store: ObjectStore, directory: Path | None) -> None:
        self._store = store
        self._directory = directory

    @property
    def closes(self) -> bool:
        """Whether `close` really keeps a late collector from moving anything."""
        return self._directory is not None

    async def chunks(self, shard: str) -> list[Found]:
        """All blobs whose hashes begin so."""
        prefix = f"chunks/{shard}"
        if self._directory is not None:
            return await asyncio.to_thread(_scan, self._directory / prefix)
        found = []
        async for batch in self._store.list(prefix=prefix):
            for meta in batch:
                hash = meta["path"].rpartition("/")[2]
                if is_hash(hash):
                    found.append(Found(hash, meta["size"], meta["last_modified"].timestamp()))
        return found

    async def condemned(self) -> list[Condemned]:
        if self._directory is not None:
            return await asyncio.to_thread(lambda: list(self._in_directory()))
        found = []
        async for batch in self._store.list(prefix="trash"):
            for meta in batch:
                if entry := _entry(meta["path"], meta["size"]):
                    found.append(entry)
        return found

    async def open(self, round: int) -> str:
        """A new name to condemn under, which nobody else knows. To be made before its round begins."""
        name = f"{round}-{secrets.token_hex(8)}"
        if self._directory is not None:
            path = self._directory / "trash" / name
            await asyncio.to_thread(path.mkdir, parents=True)
        return name

    async def close(self) -> None:
        """Of all so far: whoever still collects by one of their names can't condemn anything any more."""
        if self._directory is not None:
            await asyncio.to_thread(_close, self._directory / "trash")

    async def condemn(self, hashes: Collection[str], name: str) -> int:
        """How many were moved. One that is gone was moved by somebody else."""
        if self._directory is not None:
            return await asyncio.to_thread(_move, self._directory, hashes, name)
        done = await asyncio.gather(*(self._condemn(hash, name) for hash in hashes), return_exceptions=True)
        for error in done:  # told when none is on its way any more
            if isinstance(error, BaseException):
                raise error
        return sum(map(bool, done))

    async def purge(self, entries: Sequence[Condemned]) -> None:
        if self._directory is not None:
            await asyncio.to_thread(_delete, self._directory, [entry.place for entry in entries])
        elif entries:
            with suppress(FileNotFoundError):
                await self._store.delete_async([entry.place for entry in entries])

    async def find(self, hash: str) -> bytes | None:
        """The bytes of a condemned blob."""
        async for place in self._places(hash):
            with suppress(FileNotFoundError):
                result = await self._store.get_async(place)
                return bytes(await result.bytes_async())
        return None

    # -----------------------------------------------------------------------------------------

    async def _condemn(self, hash: str, name: str) -> bool:
        """A copy and a deletion; if only the copy comes to be, nothing is lost."""
        try:
            await self._store.rename_async(f"chunks/{hash[:2]}/{hash}", f"trash/{name}/{hash}")
        except FileNotFoundError:
            return False
        return True

    async def _places(self, hash: str) -> AsyncIterator[str]:
        if self._directory is not None:
            for name in await asyncio.to_thread(_names, self._directory / "trash"):
                yield f"trash/{name}/{hash}"
            return
        listed = await self._store.list_with_delimiter_async("trash")
        for prefix in reversed(listed["common_prefixes"]):
            yield f"{prefix.rstrip('/')}/{hash}"

    def _in_directory(self) -> Iterator[Condemned]:
        assert self._directory is not None
        for name in _names(self._directory / "trash"):
            with suppress(FileNotFoundError), os.scandir(self._directory / "trash" / name) as items:
                for item in items:
                    with suppress(FileNotFoundError):
                        if entry := _entry(f"trash/{name}/{item.name}", item.stat().st_size):
                            yield entry


def _entry(place: str, size: int) -> Condemned | None:
    _, _, rest = place.partition("/")
    name, _, hash = rest.partition("/")
    number = name.partition("-")[0]
    return Condemned(hash, int(number), size, place) if number.isdecimal() and is_hash(hash) else None


def _scan(directory: Path) -> list[Found]:
    found = []
    with suppress(FileNotFoundError), os.scandir(directory) as items:
        for item in items:
            with suppress(FileNotFoundError):
                status = item.stat()
                if is_hash(item.name):
                    found.append(Found(item.name, status.st_size, status.st_mtime))
    return found


def _names(trash: Path) -> list[str]:
    try:
        return os.listdir(trash)
    except FileNotFoundError:
        return []


def _close(trash: Path) -> None:
    for name in _names(trash):
        with suppress(FileNotFoundError):  # another collector did it just now
            if not name.endswith(_CLOSED):
                os.rename(trash / name, trash / f"{name}{_CLOSED}")
                continue
            with suppress(OSError):  # not empty yet
                os.rmdir(trash / name)


def _move(directory: Path, hashes: Iterable[str], name: str) -> int:
    """Plain renames: if the trash was closed, there is no such directory, and each fails."""
    moved = 0
    trash = directory / "trash" / name
    for hash in hashes:
        with suppress(FileNotFoundError):
            os.rename(directory / "chunks" / hash[:2] / hash, trash / hash)
            moved += 1
    return moved


def _delete(directory: Path, places: Iterable[str]) -> None:
    for place in places:
        with suppress(FileNotFoundError):
            os.unlink(directory / place)
