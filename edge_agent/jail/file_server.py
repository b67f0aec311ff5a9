"""The file operations that are done for the daemon, by a jail's init or by the file service: see
`edge_agent.jail.remote_files`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

from edge_agent.jail import entries
from edge_agent.jail.wire import Body, close_all
from edge_agent.state.tree import InSlices, Tree, TreeTooLarge, write_back_all

Answer = tuple[Body, tuple[int, ...]]
# An answer; something to be done that may wait for the disk; or None, where others may go on first.
Step = Answer | Callable[[], None] | None
_AT_ONCE = 1 << 20  # bytes of files that are written back on the way


class FileServer:
    """Answers requests on one tree. Every request gets one answer with "ok" or "error"; `scan` and
    `changed` send their entries before that, in "part"s."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree

    def forget_writes(self) -> None:
        """Drops unfinished writes: whoever began them is gone."""
        self._tree.close()

    def taken(self, most_bytes: int, most_entries: int) -> InSlices[int]:
        """See `Tree.taken`."""
        return self._tree.taken(most_bytes, most_entries)

    def answer(self, request: Body) -> Iterator[Step]:
        try:
            yield from self._answer(request)
        except FileNotFoundError as error:
            yield _error("missing", f"{error.filename or request.get('path')}: not there")
        except TreeTooLarge as error:
            yield _error("too_large", str(error))
        except ValueError as error:
            yield _error("nonsense", str(error))
        except (KeyError, TypeError, AttributeError) as error:
            yield _error("failed", f"a request that makes no sense: {error!r}")
        except OSError as error:
            what = os.strerror(error.errno or 0)
            yield _error("failed", f"{request.get('do')} in the jail's state: {what}")

    def _answer(self, request: Body) -> Iterator[Step]:
        tree = self._tree
        match request["do"]:
            case "scan":
                for page in entries.pages((yield from tree.scanning())):
                    yield {"part": page}, ()
                yield _ok()
            case "changed":
                yield from self._changed(request["since_ns"])
            case "open_read":
                yield {"ok": {}}, (tree.open_read(request["path"]),)
            case "open_write":
                yield {"ok": {}}, (tree.open_write(request["path"]),)
            case "commit_write":
                entry = yield from tree.committing(entries.from_list(request["entry"]), request["more"])
                yield _ok(entry=entries.to_list(entry))
            case "written":
                entry = tree.written(request["path"], request["mtime_ns"], request["more"])
                yield _ok(entry=entries.to_list(entry))
            case "make_dir":
                tree.make_dir(entries.from_list(request["entry"]))
                yield _ok()
            case "make_link":
                yield from tree.linking(entries.from_list(request["entry"]))
                yield _ok()
            case "remove":
                yield from tree.removing(request["path"])
                yield _ok()
            case other:
                raise ValueError(f"there is no request {other!r}")

    def _changed(self, since_ns: int) -> Iterator[Step]:
        found = yield from self._tree.scanning()
        for page in entries.pages(found):
            yield {"part": page}, ()
        opened = self._tree.open_changed(found, since_ns)
        fds = tuple(opened.values())
        try:
            yield _writing_back(fds)
        except BaseException:  # among them that whoever wanted these is gone
            close_all(fds)
            raise
        yield {"ok": {"opened": list(opened)}}, fds


def _ok(**values: Any) -> Answer:
    return {"ok": values}, ()


def _error(kind: str, message: str) -> Answer:
    return {"error": {"kind": kind, "message": message, "hint": ""}}, ()


def _writing_back(fds: tuple[int, ...]) -> Callable[[], None] | None:
    """What is left to do of it."""
    if sum(os.fstat(fd).st_size for fd in fds) <= _AT_ONCE:
        write_back_all(fds)
        return None
    copies: list[int] = []  # whoever wanted these may be gone before that is done
    try:
        for fd in fds:
            copies.append(os.dup(fd))
    except OSError:
        close_all(copies)
        raise

    def write_back() -> None:
        write_back_all(copies)
        close_all(copies)

    return write_back
