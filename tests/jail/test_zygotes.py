"""Zygotes: what is forked from one is as jailed as what is executed, and as alone."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from edge_agent.jail import protocol
from edge_agent.jail.api import Jail, JailGone, JailSpec
from edge_agent.specs import OF_A_FORK
from shared.errors import RoostError
from tests.support.eventually import eventually
from tests.support.jailer import ECHO, LIMITS, RunningJailer, alive

# Answers each message with the value of it as an expression.
EVAL = """
import os, random, sys
def attempt(f):
    try: return repr(f())
    except OSError as e: return f"errno {e.errno}"
while True:
    expression = recv().decode()
    try: send(repr(eval(expression)).encode())
    except OSError as e: send(f"errno {e.errno}".encode())
"""


async def ask(jail: Jail, expression: str) -> str:
    async with asyncio.timeout(5.0):
        await jail.send(expression.encode())
        return (await jail.receive()).decode()


async def test_instances_of_one_zygote_see_nothing_of_each_other(jailer: RunningJailer) -> None:
    zygote = await jailer.zygote("v2", EVAL)
    a, b = await jailer.forked("a", zygote), await jailer.forked("b", zygote)
    await ask(a, "open('/state/secret', 'w').write('of a')")
    assert await ask(a, "os.listdir('/state')") == "['secret']"
    assert await ask(b, "os.listdir('/state')") == "[]"
    assert await ask(b, "[p for p in os.listdir('/proc') if p.isdecimal()] == [str(os.getpid())]") == "True"
    ids = "open('/proc/self/uid_map').read().split()[1]"
    assert await ask(a, ids) != await ask(b, ids)
    for name in ("user", "pid", "mnt", "net", "ipc", "uts", "cgroup"):
        link = f"os.readlink('/proc/self/ns/{name}')"
        assert len({await ask(a, link), await ask(b, link), os.readlink(f"/proc/self/ns/{name}")}) == 3, name


async def test_the_agent_reaches_neither_zygote_nor_host_by_pid(jailer: RunningJailer) -> None:
    zygote = await jailer.zygote("v2", EVAL)
    a = await jailer.forked("a", zygote)
    parent = "open('/proc/self/status').read().split('PPid:')[1].split()[0]"
    assert await ask(a, parent) == "'0'", "its parent is in no namespace that it sees"
    pids = [p.pid for p in psutil.process_iter() if p.pid > 100]  # those below are some of the jail's, too
    kills = f"{{attempt(lambda: os.kill(p, 0)) for p in {pids} if p not in (1, os.getpid())}}"
    assert await ask(a, kills) == "{'errno 3'}", "no such process"
    assert await ask(a, "os.open('/proc/1/ns/user', 0)") in ("errno 2", "errno 13")


async def test_init_leaves_no_zombies(jailer: RunningJailer) -> None:
    """Neither of those who made the jail, nor of what an agent left."""
    zygote = await jailer.zygote("v2", EVAL)
    a = await jailer.forked("a", zygote)
    orphaned = "os.waitpid(os.fork() or os._exit(0 if os.fork() else 0), 0)[1]"
    assert await ask(a, orphaned) == "0"
    others = "[p for p in range(2, 100) if p != os.getpid() and attempt(lambda: os.kill(p, 0)) != 'errno 3']"
    await eventually(lambda: _answers(a, others, "[]"), 5.0, "there is nobody but init and the agent")


async def _answers(jail: Jail, expression: str, expected: str) -> bool:
    return await ask(jail, expression) == expected


async def test_each_fork_has_its_own_randomness_and_descriptors(jailer: RunningJailer) -> None:
    top = "import random, socket\nrandom.seed(1)\nkept = socket.socketpair()"
    zygote = await jailer.zygote("v2", EVAL, top)
    a, b = await jailer.forked("a", zygote), await jailer.forked("b", zygote)
    assert await ask(a, "random.random()") != await ask(b, "random.random()")
    fds = "sorted(int(n) for n in os.listdir('/proc/self/fd'))"
    assert await ask(a, fds) == "[0, 1, 2, 3, 4]", "the last is the listing's own"


HOOKED = """
import logging, os, random, types
done = []
library = types.ModuleType("library")
code = "import os\\ndef on_fork(first, then): os.register_at_fork(before=first, after_in_child=then)"
exec(code, library.__dict__)
library.on_fork(lambda: done.append("before"), lambda: done.append("inside"))
"""


async def test_what_libraries_want_done_around_a_fork_is_done_once(jailer: RunningJailer) -> None:
    zygote = await jailer.zygote("v2", EVAL, HOOKED)
    for jail_id in "ab":
        assert await ask(await jailer.forked(jail_id, zygote), "top['done']") == "['before', 'inside']"


async def test_a_forked_agent_may_fork_and_use_threads(jailer: RunningJailer) -> None:
    """The interpreter's own hooks were left out when it was forked: nothing that they do is missed."""
    a = await jailer.forked("a", await jailer.zygote("v2", EVAL, "import threading, subprocess, asyncio"))
    assert (
        await ask(a, "__import__('subprocess').run(['echo', 'hi'], capture_output=True).stdout") == "b'hi\\n'"
    )
    threads = "[t.start() or t.join() for t in [__import__('threading').Thread(target=print)]]"
    assert await ask(a, threads) == "[None]"
    assert (
        await ask(a, "__import__('threading').current_thread() is __import__('threading').main_thread()")
        == "True"
    )
    assert await ask(a, "__import__('asyncio').run(__import__('asyncio').to_thread(int, '7'))") == "7"
    assert await ask(a, "os.waitpid(os.fork() or os._exit(5), 0)[1] >> 8") == "5"


@pytest.mark.timeout(120)
async def test_a_zygote_outlives_what_its_many_forks_leave_it(jailer: RunningJailer) -> None:
    """Each leaves pages with it that count as its own: `starts` gives it room for those."""
    top = "hoard = [str(i) * 9 for i in range(200_000)]"
    zygote = await jailer.zygote("v2", ECHO, top)
    before = _charged(jailer, "zygote-v2")
    jails = [await jailer.forked(f"a{i}", zygote) for i in range(40)]
    assert (_charged(jailer, "zygote-v2") - before) / len(jails) < 0.9 * OF_A_FORK
    for jail in jails:
        await jail.kill()


def _jailed_in(jailer: RunningJailer, pid_namespace: str) -> list[int]:
    return [p for p in jailer.jailed() if os.readlink(f"/proc/{p}/ns/pid") == pid_namespace]


def _charged(jailer: RunningJailer, jail_id: str) -> int:
    """Bytes of memory that count as this jail's."""
    (found,) = [
        file
        for group in jailer.cgroups()
        if group.name == jail_id
        for name in ("memory.usage_in_bytes", "memory.current")
        if (file := group / name).exists()
    ]
    return int(found.read_text())


async def test_a_zygote_has_no_power(jailer: RunningJailer) -> None:
    look = """
import ctypes, errno, os, socket
libc = ctypes.CDLL(None, use_errno=True)
def unshare(flags):
    return errno.errorcode[ctypes.get_errno()] if libc.unshare(flags) else "done"
def write(path):
    try: open(path, "w").close()
    except OSError as e: return errno.errorcode[e.errno]
    return "done"
seen = {
    "status": dict(line.split(":\\t", 1) for line in open("/proc/self/status").read().splitlines()),
    "unshare": [unshare(0x10000000), unshare(0x00020000)],
    "root": sorted(os.listdir("/")), "up": sorted(os.listdir("/../..")),
    "writes": [write(p) for p in ("/x", "/agent/x", "/usr/x", "/proc/sys/kernel/hostname")],
    "processes": [n for n in os.listdir("/proc") if n.isdecimal()] == [str(os.getpid())],
    "interfaces": [n for _, n in socket.if_nameindex()],
    "fds": sorted(int(n) for n in os.listdir("/proc/self/fd")),
}
"""
    code = "import json\nrecv()\nsend(json.dumps(top['seen']).encode())\nrecv()"
    zygote = await jailer.zygote("v2", code, look)
    jail = await jailer.forked("a", zygote)
    await jail.send(b".")
    seen = json.loads(await jail.receive())
    status = seen["status"]
    assert {status[k].strip() for k in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
    assert status["NoNewPrivs"].strip() == "1"
    assert "0" not in status["Uid"].split()
    assert seen["unshare"] == ["EPERM", "EPERM"], "it is chrooted"
    assert "state" not in seen["root"]
    assert seen["up"] == seen["root"]
    assert "done" not in seen["writes"]
    assert seen["processes"]
    assert seen["interfaces"] == ["lo"]
    assert set(seen["fds"]) <= {0, 1, 2, 3, 4, 64}, "3 and 64 are its socket"


async def test_mounts_are_locked_even_for_who_has_all_capabilities_inside(jailer: RunningJailer) -> None:
    """What a hostile zygote could do after it entered: neither uncover nor write what the plan has fixed."""
    hostile = """
import ctypes, os, roost.zygote
libc = ctypes.CDLL(None, use_errno=True)
found = []
def before(*given, become=roost.zygote._become_agent):
    for target in (b"/proc/sys", b"/proc/keys", b"/usr", b"/agent", b"/state", b"/proc", b"/"):
        ok = libc.umount2(target, 2) == 0
        ok = libc.mount(None, target, None, 0x20 | 0x1000, None) == 0 and target != b"/state" or ok
        if ok: found.append(target.decode())
    if libc.mount(b"none", b"/tmp", b"tmpfs", 0, None) == 0: found.append("a new mount")
    become(*given)
roost.zygote._become_agent = before
"""
    code = "recv()\nsend(repr(top['found']).encode())\nrecv()"
    jail = await jailer.forked("a", await jailer.zygote("v2", code, hostile))
    await jail.send(b".")
    assert await jail.receive() == b"[]", "the zygote's filter leaves no call that mounts"


async def test_instances_outlive_their_zygote_and_tell_their_end(jailer: RunningJailer) -> None:
    zygote = await jailer.zygote("v2", "word = recv()\nsend(word)\nraise SystemExit(int(recv()))")
    a, b = await jailer.forked("a", zygote), await jailer.forked("b", zygote)
    zygotes = [p.pid for p in psutil.Process(jailer.process.pid).children()]
    for pid in set(_pids_of(jailer, "zygote-v2")) & set(zygotes):
        with suppress(ProcessLookupError):  # one that only forked an agent
            os.kill(pid, signal.SIGKILL)
    await eventually(lambda: zygote.ended, 5.0, "the daemon is told")
    for jail, code in ((a, 0), (b, 7)):
        await jail.send(b"still here")
        assert await jail.receive() == b"still here"
        await jail.send(str(code).encode())
        async with asyncio.timeout(5.0):
            with pytest.raises(JailGone) as caught:
                await jail.receive()
        assert caught.value.exit.code == code
    assert not jailer.cgroups()
    with pytest.raises(RoostError, match="no zygote"):
        await jailer.forked("c", zygote)
    assert not jailer.cgroups()


async def test_an_agent_killed_from_outside_and_its_last_words(jailer: RunningJailer) -> None:
    code = (
        "import sys, os\nprint('farewell', file=sys.stderr, flush=True)\nsend(b'.')\nos.kill(os.getpid(), 9)"
    )
    jail = await jailer.forked("a", await jailer.zygote("v2", code))
    await jail.receive()
    with pytest.raises(JailGone) as caught:
        await jail.receive()
    assert (caught.value.exit.code, caught.value.exit.stderr_tail) == (-9, "farewell\n")
    assert not caught.value.exit.out_of_memory


async def test_memory_limits_hold_for_what_is_forked(jailer: RunningJailer) -> None:
    jail = await jailer.forked("a", await jailer.zygote("v2", "x = bytearray(512 << 20)"))
    with pytest.raises(JailGone) as caught:
        await jail.receive()
    assert (caught.value.exit.code, caught.value.exit.out_of_memory) == (-9, True)


async def test_freeze_and_files(jailer: RunningJailer) -> None:
    jail = await jailer.forked("a", await jailer.zygote("v2", EVAL))
    await ask(jail, "open('/state/f', 'w').write('x')")
    # The process between the zygote and the agent ends a moment later, unless it is frozen before.
    await eventually(lambda: _has_pids(jail, 2), 5.0, "init and the agent")
    await jail.freeze()
    assert [e.path for e in await jail.files.scan()] == ["f"]
    await jail.thaw()
    assert await ask(jail, "1 + 1") == "2"


@pytest.mark.parametrize(
    ("top", "why"),
    [
        ("raise RuntimeError('no')", "RuntimeError: no"),
        (
            "import threading, time\nthreading.Thread(target=time.sleep, args=(99,), daemon=True).start()",
            "threads",
        ),
        ("open('/state/x')", "FileNotFoundError"),
        ("import os; os._exit(1)", "ended"),
        ("import mmap; kept = mmap.mmap(-1, 4096)", "left shared memory"),
        ("import multiprocessing as m; kept = m.Value('i')", "left shared memory"),
        (
            "import mmap, os\nfd = os.open('/tmp/f', os.O_RDWR | os.O_CREAT)\nos.truncate(fd, 4096)\n"
            "kept = mmap.mmap(fd, 4096, prot=mmap.PROT_READ)",
            "(/tmp/f)",
        ),
    ],
)
async def test_an_agent_that_can_have_no_zygote_says_why(jailer: RunningJailer, top: str, why: str) -> None:
    with pytest.raises(RoostError) as caught:
        await jailer.zygote("v2", ECHO, top)
    assert why in caught.value.message
    await eventually(lambda: not jailer.cgroups(), 5.0, "it leaves nothing")


async def test_a_jail_is_forked_into_once_and_from_its_own_version(jailer: RunningJailer) -> None:
    zygote = await jailer.zygote("v2", ECHO)
    jail = await jailer.forked("a", zygote)
    with pytest.raises(RoostError, match="can't be forked into"):
        await jail.start()
    with pytest.raises(RoostError, match="not of version"):
        await jailer.jails.make(JailSpec("b", "v1", ("/none",), {}, LIMITS, zygote.jail_id))
    await zygote.kill()
    with pytest.raises(RoostError, match="runs"):
        await jailer.jails.discard(zygote.jail_id)  # its uid owns the namespaces of a
    await jail.kill()
    await jailer.jails.discard(zygote.jail_id)


async def test_a_daemons_end_ends_zygotes_and_not_their_instances(jailer: RunningJailer) -> None:
    zygote = await jailer.zygote("v2", ECHO)
    await jailer.forked("a", zygote)
    os.kill(jailer.daemon_pid, signal.SIGKILL)
    jails = await jailer.reconnect()
    (adopted,) = await jails.adopt()
    await adopted.send(b"on")
    assert await adopted.receive() == b"on"
    await eventually(lambda: not _pids_of(jailer, "zygote-v2"), 5.0, "the zygote is gone")


async def test_when_the_jailer_is_killed_zygotes_and_forks_die(jailer: RunningJailer) -> None:
    zygote = await jailer.zygote("v2", ECHO)
    await jailer.forked("a", zygote)
    everybody = "the zygote, its spare child, the fork that waits, init and agent"
    await eventually(lambda: len(jailer.jailed()) == 5, 5.0, everybody)
    pids = jailer.jailed()
    jailer.signal(signal.SIGKILL)
    await eventually(lambda: not [p for p in pids if alive(p)], 5.0, "all die with it")
    await jailer.process.wait(5.0)
    await jailer.start()
    assert not jailer.cgroups()


async def test_a_fork_that_waits_is_killed_and_its_zygote_forks_on(jailer: RunningJailer) -> None:
    zygote = await jailer.zygote("v2", ECHO)
    await jailer.forked("a", zygote)
    await eventually(lambda: len(jailer.shells()) == 1, 5.0, "a shell waits")
    (shell,) = jailer.shells()
    inside = os.readlink(f"/proc/{shell}/ns/pid")
    waiting = await eventually(lambda: _jailed_in(jailer, inside), 5.0, "a fork waits in it")
    os.kill(waiting[0], signal.SIGKILL)
    await eventually(lambda: shell not in jailer.inits(), 5.0, "its shell is of no use any more")
    b = await jailer.forked("b", zygote)
    await b.send(b"hello")
    assert await b.receive() == b"hello"


@pytest.mark.parametrize("after", [0.0, 0.004, 0.008, 0.012, 0.016, 0.02, 0.03])
async def test_a_jailer_killed_while_it_makes_forks_leaves_no_process(
    jailer: RunningJailer, after: float
) -> None:
    zygote = await jailer.zygote("v2", ECHO)
    making = [asyncio.create_task(jailer.forked(f"a{i}", zygote)) for i in range(3)]
    await asyncio.sleep(after)
    jailer.signal(signal.SIGKILL)
    await asyncio.gather(*making, return_exceptions=True)
    await eventually(lambda: not jailer.forked_only() and not jailer.jailed(), 5.0, "all are gone")
    await jailer.process.wait(5.0)
    await jailer.start()
    assert not jailer.cgroups()


async def test_jails_killed_while_they_are_made_leave_nothing(jailer: RunningJailer) -> None:
    zygote = await jailer.zygote("v2", ECHO)
    for i, after in enumerate((0.0, 0.003, 0.006, 0.009, 0.012, 0.015, 0.018, 0.021)):
        making = asyncio.create_task(jailer.forked(f"a{i}", zygote))
        await asyncio.sleep(after)
        making.cancel()
        await asyncio.gather(making, return_exceptions=True)
        with suppress(RoostError):  # it may never have been, or be gone
            await jailer.jails.ask(protocol.Kill(f"a{i}"), 5.0)
    # The zygote and its spare child; and one that waits in a shell, if the last that was begun was not taken.
    await eventually(lambda: len(jailer.jailed()) in (2, 3), 5.0, "only what waits for the next is left")
    await zygote.kill()
    await eventually(lambda: not jailer.jailed(), 5.0, "and that ends with the zygote")
    assert not jailer.cgroups()


def _pids_of(jailer: RunningJailer, jail_id: str) -> list[int]:
    state = Path(jailer.data_dir / "jails" / jail_id / "state")
    return [p.pid for p in psutil.process_iter() if alive(p.pid) and p.uids().real == state.stat().st_uid]


FILTERED = """
import ctypes, errno, os, socket
libc = ctypes.CDLL(None, use_errno=True)
def call(name, *arguments):
    return errno.errorcode[ctypes.get_errno()] if getattr(libc, name)(*arguments) < 0 else "done"
"""


async def test_what_a_zygote_forks_is_behind_the_agents_filter(jailer: RunningJailer) -> None:
    zygote = await jailer.zygote("v2", EVAL, FILTERED)
    a = await jailer.forked("a", zygote)
    status = "[l.split()[1] for l in open('/proc/self/status') if l.startswith(('Seccomp', 'NoNewPrivs'))]"
    assert await ask(a, status) == "['1', '2', '2']", "no_new_privs, a filter, and two of them"
    for refused in (
        "top['call']('unshare', 0x10000000)",
        "top['call']('setns', 0, 0)",
        "top['call']('mount', None, b'/tmp', b'tmpfs', 0, None)",
        "top['call']('ptrace', 0, 0, 0, 0)",
        "top['call']('syscall', 321, 0, 0, 0)",
        "top['call']('syscall', 250, 0, 0, 0)",
    ):
        assert await ask(a, refused) == "'EPERM'", refused
    assert await ask(a, "__import__('resource').getrlimit(4)") == "(1, 1)"


async def _has_pids(jail: Jail, count: int) -> bool:
    return (await jail.usage()).pids == count
