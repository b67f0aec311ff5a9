"""Tasks: commands that an agent has run in jails of their own, during one turn.

Always true:
- A task has room before it has a jail; it ends with its turn, however that ends, and with this daemon: the
  jailer sees to that.
- Nothing of it outlives it but what it wrote, in bounds, which is told to the agent and to nobody else.
- A task has no socket to the node: it can't ask for tasks, nor end a turn.
- What a turn keeps in memory is bounded: `at_once` tasks, and their results until the agent has read them.

How it can fail: no room (NO_ROOM), a request that makes no sense or asks for too much (BAD_REQUEST), the
jailer refuses (JAIL_FAILED), this node may not be the owner any more (NODE_SUSPENDED). The agent is told, and
the turn goes on. That a task fails, takes too long or takes too much is no error but its result.
"""

from __future__ import annotations

import asyncio
import fnmatch
import os
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from edge_agent.control import Agent
from edge_agent.jail.api import Jail, JailGone, Jails, JailSpec, TaskJail
from edge_agent.reservations import Reservations
from edge_agent.state.files import Entry, Files, Kind
from edge_agent.task_messages import (
    MAX_FILES,
    MAX_FILES_BYTES,
    MAX_PATH,
    MAX_STREAM_BYTES,
    Finished,
    Run,
    name_of,
    parse_run,
    refusal,
    result,
)
from edge_agent.tenure import Tenure
from shared.errors import Reason, RoostError

_MAKING_AT_ONCE = 2  # on this node: tasks must not keep the jailer from starting instances
_MAX_UNREAD = 256  # answers that an agent lets wait
_LAST_WORDS_SECONDS = 2.0  # from the end of a program to the end of its output
_CHUNK = 1 << 16
_PAUSE = 0.01  # seconds between reads of output that nobody keeps


class Tasks:
    """Those of a node."""

    def __init__(
        self, jails: Jails, reservations: Reservations, tenure: Tenure, clock: Callable[[], float]
    ) -> None:
        self._jails = jails
        self._reservations = reservations
        self._tenure = tenure
        self._clock = clock
        self._making = asyncio.Semaphore(_MAKING_AT_ONCE)

    def of_turn(self, agent: Agent, jail: Jail, turn_id: str) -> TurnTasks:
        return TurnTasks(self, agent, jail, turn_id)

    async def run(self, run: Run, agent: Agent) -> Finished:
        """Cancelling it ends the task."""
        now = self._clock()
        if not self._tenure.trusted(now):
            raise suspended()
        jail_id = f"{agent.policy.agent.name[:24]}-task-{uuid.uuid4().hex[:24]}"
        try:
            self._reservations.claim(jail_id, 0, run.need, now)
        except RoostError as full:
            hint = "let it use less, or run it later: the rest of the turn is not affected"
            raise RoostError(Reason.NO_ROOM, full.message, hint) from full
        try:
            async with self._making:
                jail = await self._jails.task(JailSpec(jail_id, agent.version, run.argv, limits=run.need))
            try:
                return await _run_in(jail, run)
            finally:
                await jail.kill()
        finally:
            self._reservations.release(jail_id, 0)


def suspended() -> RoostError:
    return RoostError(
        Reason.NODE_SUSPENDED,
        "the node has lost touch with its coordinator, so the task was ended or not begun",
        "the turn may still come to a good end; run it again then",
    )


class TurnTasks:
    """Those of one turn. A context: when it is left, none of them is left."""

    def __init__(self, tasks: Tasks, agent: Agent, jail: Jail, turn_id: str) -> None:
        self._tasks = tasks
        self._agent = agent
        self._jail = jail
        self._turn_id = turn_id
        self._running: set[asyncio.Task[None]] = set()
        self._answers: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._sender: asyncio.Task[None] | None = None
        self._ended_by: RoostError | None = None
        self._over = False

    async def __aenter__(self) -> TurnTasks:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        self._cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        self._over = True
        if self._sender is None:
            return
        while not self._answers.empty():
            self._answers.get_nowait()
        self._answers.put_nowait(None)
        try:
            if kind is None:  # else the agent is to be killed, and needs no whole answer
                await self._sender
        finally:
            self._sender.cancel()

    def tell(self, answer: bytes) -> None:
        """Sends the agent something else in its turn, for a socket has one sender. Nothing after that."""
        if self._over:
            return
        if self._sender is None:
            self._sender = asyncio.create_task(self._send(), name=f"answers of turn {self._turn_id}")
        self._answers.put_nowait(answer)

    def begin(self, message: Mapping[str, Any]) -> None:
        """What the agent asks for goes on by itself, up to an answer. BAD_REQUEST if it could not even be
        answered: the agent has broken the protocol."""
        name = name_of(message)
        if self._answers.qsize() >= _MAX_UNREAD:
            raise RoostError(Reason.BAD_REQUEST, f"it reads none of {_MAX_UNREAD} answers")
        policy = self._agent.policy.tasks
        try:
            run = parse_run(message, policy)
            self._check_number(policy.at_once)
        except RoostError as error:
            self.tell(refusal(self._turn_id, name, error))
            return
        task = asyncio.create_task(self._run(run), name=f"task {name} of turn {self._turn_id}")
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    def _check_number(self, most: int) -> None:
        if len(self._running) + self._answers.qsize() >= most:
            raise RoostError(
                Reason.NO_ROOM,
                f"{most} tasks of this turn run already",
                "wait for one of them, or raise tasks.at_once in agent.toml",
            )

    def end(self, why: RoostError) -> None:
        """Ends what runs now, and tells the agent why."""
        self._ended_by = why
        self._cancel()

    def _cancel(self) -> None:
        """Once: a second time would interrupt the end of its jail."""
        for task in self._running:
            if not task.cancelling():
                task.cancel()

    async def _run(self, run: Run) -> None:
        try:
            answer = result(self._turn_id, run.task, await self._tasks.run(run, self._agent))
        except asyncio.CancelledError:
            if self._ended_by is None:
                raise
            answer = refusal(self._turn_id, run.task, self._ended_by)
        except RoostError as error:
            answer = refusal(self._turn_id, run.task, error)
        self.tell(answer)

    async def _send(self) -> None:
        while (answer := await self._answers.get()) is not None:
            with suppress(JailGone):  # who waits for its messages is told
                await self._jail.send(answer)


# --- one task ------------------------------------------------------------------------------------


async def _run_in(jail: TaskJail, run: Run) -> Finished:
    files: dict[str, bytes] = {}
    omitted: tuple[str, ...] = ()
    streams: list[_Stream] = []
    timed_out = False
    try:
        await _put(jail.files, run.files)
        streams += [_Stream(fd) for fd in await jail.begin()]
        timed_out = await jail.wait(run.timeout) is None
        if not timed_out:
            files, omitted = await _take(jail.files, run.outputs)
        exit = await jail.kill()
        for stream in streams:
            await stream.rest(_LAST_WORDS_SECONDS)
    except JailGone as gone:  # the kernel chose its init when it ran out of memory
        exit = gone.exit
    finally:
        for stream in streams:
            stream.close()
    output, errors = (bytes(stream.kept) for stream in streams) if streams else (b"", b"")
    truncated = any(stream.truncated for stream in streams)
    return Finished(exit.code, output, errors, truncated, files, omitted, timed_out, exit.out_of_memory)


async def _put(files: Files, given: Mapping[str, bytes]) -> None:
    made: set[str] = set()
    try:
        for path, data in given.items():
            parts = path.split("/")
            for depth in range(1, len(parts)):
                directory = "/".join(parts[:depth])
                if directory not in made:
                    await files.make_dir(Entry(directory, Kind.DIR, 0o755))
                    made.add(directory)
            _write(await files.open_write(path), data)
            await files.commit_write(Entry(path, Kind.FILE, 0o644))
    except (OSError, ValueError) as error:
        raise RoostError(
            Reason.BAD_REQUEST,
            f"the files of a task can't be put in place: {error}",
            "half of its memory is for files; a path can't be both a file and a directory",
        ) from error


def _write(fd: int, data: bytes) -> None:
    """Closes it."""
    with open(fd, "wb") as file:
        file.write(data)


async def _take(files: Files, patterns: tuple[str, ...]) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """The files whose paths match, and the paths of those that are too many or too large."""
    if not patterns:
        return {}, ()
    entries = await files.scan()
    wanted = await asyncio.to_thread(_matching, entries, patterns)  # of many files it takes a while
    taken: dict[str, bytes] = {}
    omitted: list[str] = []
    left = MAX_FILES_BYTES
    for path in wanted:
        data = None
        if len(taken) < MAX_FILES:
            with suppress(FileNotFoundError):
                data = _read(await files.open_read(path), left)
        if data is not None:
            taken[path] = data
            left -= len(data)
        elif len(omitted) < MAX_FILES:
            omitted.append(path)
    return taken, tuple(omitted)


def _matching(entries: list[Entry], patterns: tuple[str, ...]) -> list[str]:
    """Of regular files, whose paths are text and fit into a result."""
    return [
        e.path
        for e in entries
        if e.kind is Kind.FILE
        and e.path.isprintable()
        and len(e.path.encode()) <= MAX_PATH
        and any(fnmatch.fnmatchcase(e.path, pattern) for pattern in patterns)
    ]


def _read(fd: int, most: int) -> bytes | None:
    """None if there is more. Closes it."""
    with open(fd, "rb") as file:
        data = file.read(most + 1)
    return data if len(data) <= most else None


class _Stream:
    """Keeps the first 512 KiB of what comes out of a pipe, which it owns. A program that goes on to write is
    not stopped, but slowed down: what nobody keeps must not keep this daemon busy."""

    def __init__(self, fd: int) -> None:
        os.set_blocking(fd, False)
        self.kept = bytearray()
        self.truncated = False
        self._fd = fd
        self._loop = asyncio.get_running_loop()
        self._resume: asyncio.TimerHandle | None = None
        self._over = asyncio.Event()
        self._loop.add_reader(fd, self._read)

    async def rest(self, timeout: float) -> None:
        """Waits until nobody can write to it any more, or so many seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._over.wait()

    def close(self) -> None:
        self._loop.remove_reader(self._fd)
        if self._resume is not None:
            self._resume.cancel()
        os.close(self._fd)

    def _read(self) -> None:
        try:
            data = os.read(self._fd, _CHUNK)
        except BlockingIOError:
            return
        if not data:
            self._loop.remove_reader(self._fd)
            self._over.set()
            return
        left = MAX_STREAM_BYTES - len(self.kept)
        self.kept += data[:left]
        if len(data) > left:
            self.truncated = True
            self._loop.remove_reader(self._fd)
            self._resume = self._loop.call_later(_PAUSE, self._go_on)

    def _go_on(self) -> None:
        self._loop.add_reader(self._fd, self._read)
