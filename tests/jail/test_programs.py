"""What honest programs do still works behind the walls."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from shared.resources import Resources
from tests.support.jailer import RunningJailer, python, spec

LIMITS = Resources(memory_bytes=512 << 20, cpu_millis=2000, pids=64)

# Each sends "ok", or fails with a traceback.
PROGRAMS = {
    "sqlite with a write-ahead log": """
import sqlite3
db = sqlite3.connect("/state/db"); assert db.execute("pragma journal_mode=wal").fetchone() == ("wal",)
with db: db.execute("create table t (x)"); db.executemany("insert into t values (?)", zip(range(999)))
assert db.execute("select count(*) from t").fetchone() == (999,)
other = sqlite3.connect("/state/db"); assert other.execute("select max(x) from t").fetchone() == (998,)
""",
    "threads": """
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(8) as pool: assert sum(pool.map(lambda x: x * x, range(1000))) == 332833500
""",
    "subprocesses and pipes": """
import subprocess
assert subprocess.run("echo a b | tr a-z A-Z", shell=True, capture_output=True).stdout == b"A B\\n"
assert subprocess.run(["/bin/sh", "-c", "exit 7"]).returncode == 7
assert subprocess.run(["true"], start_new_session=True, close_fds=True, cwd="/tmp").returncode == 0
""",
    "asyncio: sockets, signals, subprocesses": """
import asyncio
async def main():
    async def echo(r, w): w.write(await r.read(5)); await w.drain(); w.close()
    server = await asyncio.start_server(echo, "localhost", 0)
    r, w = await asyncio.open_connection("127.0.0.1", server.sockets[-1].getsockname()[1])
    w.write(b"hello"); assert await r.read(5) == b"hello"; w.close()
    unix = await asyncio.start_unix_server(echo, "/tmp/s")
    r, w = await asyncio.open_unix_connection("/tmp/s"); w.write(b"hallo"); assert await r.read(5) == b"hallo"
    p = await asyncio.create_subprocess_exec("cat", stdin=-1, stdout=-1)
    assert (await p.communicate(b"x"))[0] == b"x"
    assert await asyncio.to_thread(lambda: 3) == 3
asyncio.run(main())
""",
    "multiprocessing: fork, pool, shared memory, semaphores": """
import multiprocessing as mp, os
from multiprocessing.shared_memory import SharedMemory
context = mp.get_context("fork")
with context.Pool(3) as pool: assert pool.map(abs, range(-50, 0)) == list(range(50, 0, -1))
queue = context.Queue(); p = context.Process(target=queue.put, args=(5,)); p.start(); assert queue.get() == 5
p.join(); memory = SharedMemory(create=True, size=99); memory.buf[0] = 1; memory.close(); memory.unlink()
""",
    "files: locks, mappings, watches, copies, temporary ones": """
import fcntl, mmap, os, shutil, tempfile, pathlib
with tempfile.NamedTemporaryFile(dir="/state") as f:
    fcntl.flock(f, fcntl.LOCK_EX); fcntl.lockf(f, fcntl.LOCK_EX); f.write(b"x" * 9999); f.flush(); os.fsync(f)
    with mmap.mmap(f.fileno(), 9999) as m: m[0:1] = b"y"; m.flush(); m.madvise(mmap.MADV_DONTNEED)
    shutil.copy2(f.name, "/tmp/copy"); os.mkfifo("/tmp/pipe"); os.posix_fallocate(f.fileno(), 0, 1 << 20)
    os.setxattr(f.name, "user.x", b"1"); os.memfd_create("x"); os.eventfd(0)
    os.chmod(f.name, 0o700); os.utime(f.name); os.statvfs("/state"); os.sync()
shutil.copytree("/agent", "/tmp/tree"); shutil.rmtree("/tmp/tree"); pathlib.Path("/state/l").symlink_to("x")
""",
    "what programs ask about the machine": """
import os, platform, resource, socket, time, getpass, locale, signal, ssl, uuid
assert os.cpu_count() and os.sched_getaffinity(0) and os.getloadavg() and platform.platform() and uuid.uuid4()
assert getpass.getuser() == "agent" and socket.gethostname() and socket.if_nameindex()
assert socket.getaddrinfo("localhost", 80) and ssl.create_default_context()
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 1024))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); os.nice(1); os.setpriority(os.PRIO_PROCESS, 0, 5)
signal.setitimer(signal.ITIMER_REAL, 100); time.sleep(0.001)
os.pidfd_open(os.getpid()); os.getrandom(4); os.sysconf("SC_NPROCESSORS_ONLN"); os.setresuid(-1, 1000, -1)
""",
    "a sandbox of its own": """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(15, b"name", 0, 0, 0) == 0
assert libc.syscall(444, None, 0, 1) >= 1 or ctypes.get_errno() in (38, 95)  # Landlock's version, if any
""",
}


async def _ok(jailer: RunningJailer, argv: tuple[str, ...]) -> None:
    jail = await jailer.jails.make(spec("a", argv, LIMITS))
    await jail.start()
    async with asyncio.timeout(30.0):
        assert await jail.receive() == b"ok"


@pytest.mark.parametrize("program", PROGRAMS)
async def test_python(jailer: RunningJailer, program: str) -> None:
    await _ok(jailer, python(PROGRAMS[program] + "\nsend(b'ok')\nwhile True: recv()"))


NODE = """
const fs = require("fs"), os = require("os"), net = require("net"), cp = require("child_process");
const { Worker } = require("worker_threads");
os.networkInterfaces(); os.cpus(); os.freemem(); fs.writeFileSync("/state/x", "1");
if (cp.execSync("echo hi").toString() !== "hi\\n") process.exit(1);
new Worker("1", { eval: true }).on("exit", () => {
  const server = net.createServer((s) => s.end("ok")).listen(0, "127.0.0.1", () => {
    net.connect(server.address().port).on("data", () => fs.promises.readFile("/state/x").then(() => {
      fs.writeSync(3, Buffer.from([0, 0, 0, 2, 111, 107])); setInterval(() => {}, 1000); })); }); });
"""


@pytest.mark.skipif(not Path("/usr/bin/node").exists(), reason="node is not here")
async def test_node(jailer: RunningJailer) -> None:
    await _ok(jailer, ("/usr/bin/node", "-e", NODE))


async def test_shell(jailer: RunningJailer) -> None:
    script = r"""set -e; cd /state; echo a > f; cp f g; mv g h; grep -q a h; tar cf t f; ls -la | sort
    (sleep 0.01; true) & wait; trap 'x=1' USR1; kill -USR1 $$; test "$x" = 1; test "$(id -u)" = 1000
    ulimit -c 0; find / -maxdepth 1 >/dev/null; printf '\0\0\0\2ok' >&3; exec sleep 100"""
    await _ok(jailer, ("/bin/bash", "-c", script))


def _wheels() -> Path | None:
    """Where this interpreter has numpy, if it has."""
    find = "import importlib.util as u; s = u.find_spec('numpy'); print(s.origin if s else '')"
    origin = subprocess.run([sys.executable, "-c", find], capture_output=True, text=True, check=True).stdout
    return Path(origin.strip()).parents[1] if origin.strip() else None


async def test_native_wheels(jailer: RunningJailer) -> None:
    """As an agent's version would bring them: beside its code, with compiled parts and threads."""
    wheels = _wheels()
    names = (
        ("numpy", "numpy.libs")
        if wheels
        else ("zstandard", "blake3", "cryptography", "cffi", "_cffi_backend")
    )
    source = wheels or Path(next(p for p in sys.path if p.endswith("site-packages")))
    for name in names:
        for found in [*source.glob(name), *source.glob(f"{name}.*so")]:
            target = jailer.data_dir / "bundles/v1" / found.name
            shutil.copytree(found, target) if found.is_dir() else shutil.copy(found, target)
    numpy = (
        "import numpy as n; a = n.random.rand(300, 300); assert (a @ n.linalg.inv(a)).trace().round() == 300"
    )
    others = (
        "import zstandard, blake3; from cryptography.fernet import Fernet; Fernet(Fernet.generate_key())\n"
    )
    others += (
        "assert zstandard.decompress(zstandard.compress(b'x')) == b'x'; blake3.blake3(b'x' * 9999).digest()"
    )
    code = "import sys; sys.path.insert(0, '/agent')\n" + (numpy if wheels else others)
    await _ok(jailer, python(code + "\nsend(b'ok')\nwhile True: recv()"))


async def test_the_denials_are_answers_and_not_deaths(jailer: RunningJailer) -> None:
    """A program that tries, and goes on without: what it gets is an errno it knows."""
    code = """
import ctypes, errno, json, socket
libc = ctypes.CDLL(None, use_errno=True)
def syscall(n, *a): ctypes.set_errno(0); libc.syscall(n, *a); return errno.errorcode[ctypes.get_errno()]
def opened(*a):
    try: socket.socket(*a).close()
    except OSError as e: return errno.errorcode[e.errno]
    return "opened"
answers = [syscall(425, 4, None), syscall(435, None, 0), syscall(999), opened(17, 3), opened(2, 3, 1)]
send(json.dumps(answers).encode())
while True: recv()
"""
    jail = await jailer.jails.make(spec("a", python(code), LIMITS))
    await jail.start()
    async with asyncio.timeout(10.0):
        assert json.loads(await jail.receive()) == ["EPERM", "ENOSYS", "ENOSYS", "EAFNOSUPPORT", "EPERM"]
