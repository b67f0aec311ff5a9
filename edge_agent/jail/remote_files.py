"""A jail's files, reached through its init or the file service: `Files` over the control socket.

The names and kinds that come back were made by an untrusted agent, and the descriptors are of its files: they
are read as bytes and never as paths of this machine.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from edge_agent.jail import entries
from edge_agent.jail.calls import Answer, CallFailed
from edge_agent.jail.wire import Body
from edge_agent.state.files import Entry
from shared.errors import Reason, RoostError

Ask = Callable[[Body, float], Awaitable[Answer]]

_SECONDS = 10.0
_TREE_SECONDS = 60.0  # for what goes through a whole tree


class RemoteFiles:
    """`ask` sends a request to whoever serves them; JailGone comes from there."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask

    async def scan(self) -> list[Entry]:
        return _entries(await self._call({"do": "scan"}, _TREE_SECONDS))

    async def changed(self, since_ns: int) -> tuple[list[Entry], dict[str, int]]:
        answer = await self._call({"do": "changed", "since_ns": since_ns}, _TREE_SECONDS)
        return _entries(answer), dict(zip(answer.values["opened"], answer.fds, strict=True))

    async def open_read(self, path: str) -> int:
        return _only(await self._call({"do": "open_read", "path": path}))

    async def open_write(self, path: str) -> int:
        return _only(await self._call({"do": "open_write", "path": path}))

    async def commit_write(self, entry: Entry, more: bool = False) -> Entry:
        return _entry(await self._call({"do": "commit_write", "entry": entries.to_list(entry), "more": more}))

    async def written(self, path: str, mtime_ns: int, more: bool) -> Entry:
        return _entry(await self._call({"do": "written", "path": path, "mtime_ns": mtime_ns, "more": more}))

    async def make_dir(self, entry: Entry) -> None:
        await self._call({"do": "make_dir", "entry": entries.to_list(entry)})

    async def make_link(self, entry: Entry) -> None:
        await self._call({"do": "make_link", "entry": entries.to_list(entry)})

    async def remove(self, path: str) -> None:
        await self._call({"do": "remove", "path": path}, _TREE_SECONDS)

    async def _call(self, body: dict[str, Any], timeout: float = _SECONDS) -> Answer:
        try:
            return await self._ask(body, timeout)
        except CallFailed as failed:
            match failed.kind:
                case "missing":
                    raise FileNotFoundError(2, failed.message, str(body.get("path", ""))) from None
                case "nonsense":
                    raise ValueError(failed.message) from None
                case "too_large":
                    raise RoostError(
                        Reason.STATE_TOO_LARGE,
                        f"the state is too large: {failed.message}",
                        "let the agent keep fewer files, or put them into one database",
                    ) from None
                case _:
                    raise RoostError(Reason.JAIL_FAILED, failed.message, failed.hint) from None


def _entries(answer: Answer) -> list[Entry]:
    return [entries.from_list(values) for page in answer.parts for values in page]


def _entry(answer: Answer) -> Entry:
    return entries.from_list(answer.values["entry"])


def _only(answer: Answer) -> int:
    (fd,) = answer.fds
    return fd
