"""Tasks of real agents: what they get, what they can't do, and that none outlives its turn."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from roost import AsyncClient
from shared.errors import Reason, RoostError
from tests.support.eventually import eventually
from tests.support.mesh import CLOUD, NORTH, TTL, Mesh, running_mesh

EXAMPLE = Path(__file__).parents[2] / "examples" / "coder"

# Runs what a message lists, all at once, and tells what came of it. {"exit_after"}: the agent's process ends;
# {"reply_after"}: it does not wait for them.
RUNNER = """
import asyncio, json, os
from roost import Agent, TaskError

agent = Agent()
turns = 0

async def one(turn, options):
    try:
        result = await turn.run_async(**options)
    except TaskError as error:
        return {"error": error.reason, "message": str(error)}
    told = result._asdict()
    told["files"] = {name: data.decode() for name, data in result.files.items()}
    return told

@agent.turn
async def run(turn):
    global turns
    turns += 1
    asked = json.loads(turn.message)
    loop = asyncio.get_running_loop()
    if "exit_after" in asked:
        loop.call_later(asked["exit_after"], os._exit, 7)
    if "note" in asked:
        (turn.state_dir / asked["note"]).write_text("of the agent")
    running = [asyncio.ensure_future(one(turn, options)) for options in asked.get("run", ())]
    if "reply_after" in asked:
        await asyncio.wait(running, timeout=asked["reply_after"])
        return json.dumps({"turns": turns})
    return json.dumps({"turns": turns, "results": await asyncio.gather(*running)})
"""


def runner(directory: Path, tasks: str = "", run: str = "") -> Path:
    root = directory / "runner"
    root.mkdir(exist_ok=True)
    (root / "runner.py").write_text(RUNNER)
    (root / "agent.toml").write_text(
        f'[agent]\nname = "runner"\n[run]\nentry = "runner:agent"\n{run}\n[tasks]\n{tasks}\n'
    )
    return root


def python(code: str, **options: Any) -> dict[str, Any]:
    return {"argv": ["python3", "-I", "-c", code], **options}


async def ask(client: AsyncClient, *run: dict[str, Any], **asked: Any) -> dict[str, Any]:
    async with client.attach("runner", "ana") as ana:
        answer = json.loads((await ana.send(json.dumps({"run": run, **asked}))).text)
    assert isinstance(answer, dict)
    return answer


def tasks(mesh: Mesh, node: str = "edge-north") -> int:
    """Of how many tasks there are processes on the node; each is known by its control group."""
    found: set[str] = set()
    for process in mesh.nodes[node].tree():
        with suppress(OSError):
            found |= set(
                re.findall(r"/(\S+-task-[0-9a-f]+)", Path(f"/proc/{process.pid}/cgroup").read_text())
            )
    return len(found)


async def test_the_example_runs_code_and_keeps_its_files(tmp_path: Path) -> None:
    async with running_mesh(tmp_path / "mesh", [NORTH, CLOUD]) as mesh:
        await mesh.deploy(EXAMPLE)
        async with mesh.client() as client, client.attach("coder", "ana") as ana:
            assert (await ana.send("print(6 * 7)")).text == "42"
            fenced = "```python\nopen('notes.txt', 'w').write('eggs')\n```"
            assert (await ana.send(fenced)).text == "notes.txt: 4 bytes"
            failed = (await ana.send("import os; print(os.listdir('.'))\n1 / 0")).text
            assert failed.startswith("['main.py', 'notes.txt']\nTraceback")
            assert failed.endswith("ZeroDivisionError: division by zero\nIt ended with code 1.")
            assert (await ana.send("pass")).text == "It said nothing."
            await mesh.nodes["edge-north"].kill()
            moved = await ana.send("print(open('notes.txt').read())")
            assert (moved.text, moved.receipt.node) == ("eggs", "cloud-1")


async def test_a_task_sees_nothing_of_its_agent(tmp_path: Path) -> None:
    code = (
        "import os, glob, json, socket\n"
        "def no(f):\n"
        "    try: return f()\n"
        "    except OSError as e: return type(e).__name__\n"
        "print(json.dumps({'state': os.listdir('/state'), 'env': sorted(os.environ),\n"
        "  'fds': os.listdir('/proc/self/fd'),\n"
        "  'processes': [p for p in os.listdir('/proc') if p.isdigit() and int(p) > 2],\n"
        "  'net': no(lambda: socket.create_connection(('1.1.1.1', 53), 1))}))\n"
    )
    async with running_mesh(tmp_path / "mesh", [NORTH]) as mesh:
        await mesh.deploy(runner(tmp_path))
        async with mesh.client() as client:
            other = python("import time; open('secret', 'w'); time.sleep(2)")
            answer = await ask(client, python(code), other, note="diary")
            seen = json.loads(answer["results"][0]["stdout"])
            assert seen == {
                "state": [],
                "env": ["HOME", "LANG", "PATH", "TMPDIR"],
                "fds": ["0", "1", "2", "3"],  # the last is that of the listing
                "processes": [],
                "net": "OSError",
            }


async def test_bombs_in_a_task_do_not_hurt_its_agent(tmp_path: Path) -> None:
    forks = python("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", timeout=1)
    memory = python("x = bytearray(1 << 30)")
    endless = {"argv": ["yes"], "timeout": 1}
    lingers = {"argv": ["sh", "-c", "sleep 1000 & echo left; exit 3"]}
    traps = python(
        "import os; os.symlink('/etc/passwd', 'a.txt'); os.symlink('/', 'd'); os.mkfifo('b.txt')\n"
        "os.mkdir('sub'); open('sub/c.txt', 'w').write('mine'); os.link('sub/c.txt', 'd.txt')",
        outputs=["*.txt"],
    )
    async with running_mesh(tmp_path / "mesh", [NORTH]) as mesh:
        await mesh.deploy(runner(tmp_path, "at_once = 8"))
        async with mesh.client() as client:
            await ask(client)
            began = time.monotonic()
            answer = await ask(client, forks, memory, endless, lingers, traps)
            assert time.monotonic() - began < 20
            f, m, e, li, t = answer["results"]
            assert answer["turns"] == 2, "the agent's process is still the same"
            assert (f["timed_out"], f["code"]) == (True, -9)
            assert (m["out_of_memory"], m["timed_out"]) == (True, False)
            assert (e["timed_out"], e["truncated"], len(e["stdout"])) == (True, True, 512 << 10)
            assert (li["code"], li["stdout"]) == (3, "left\n")
            assert t["files"] == {"d.txt": "mine", "sub/c.txt": "mine"}
            await eventually(lambda: not tasks(mesh), 5.0, "no task is left")


async def test_twenty_at_once_and_more_than_the_node_has_room_for(tmp_path: Path) -> None:
    async with running_mesh(tmp_path / "mesh", [NORTH]) as mesh:
        await mesh.deploy(runner(tmp_path, "at_once = 20"))
        async with mesh.client() as client:
            small = [python(f"print({n})", memory="32M", cpu=0.2, pids=4, timeout=25) for n in range(20)]
            answer = await ask(client, *small)
            assert [r.get("stdout", r) for r in answer["results"]] == [f"{n}\n" for n in range(20)]
            answer = await ask(client, *(python("import time; time.sleep(3)") for _ in range(10)))
            full = [r for r in answer["results"] if "error" in r]
            assert 1 <= len(full) < 10, "1 GiB is not enough for ten of 128 MiB beside the agent"
            assert {r["error"] for r in full} == {"NO_ROOM"}
            assert "use less" in full[0]["message"]
            assert [r["code"] for r in answer["results"] if "error" not in r] == [0] * (10 - len(full))
            assert (await ask(client, python("print(1)")))["results"][0]["stdout"] == "1\n", (
                "room is free again"
            )


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"exit_after": 1.0}, Reason.AGENT_CRASHED),
        ({"reply_after": 1.0}, None),
        ({}, Reason.TURN_TIMEOUT),
    ],
    ids=["crash", "reply", "timeout"],
)
async def test_no_task_outlives_its_turn(
    tmp_path: Path, asked: dict[str, Any], reason: Reason | None
) -> None:
    async with running_mesh(tmp_path / "mesh", [NORTH]) as mesh:
        await mesh.deploy(runner(tmp_path, run='turn_timeout = "3s"\nstart = "exec"'))
        async with mesh.client() as client:
            await ask(client)
            busy = [python("while True: pass", cpu=0.1) for _ in range(3)]
            running = asyncio.create_task(ask(client, *busy, **asked))
            await eventually(lambda: tasks(mesh) == 3, 10.0, "three tasks run")
            if reason is None:
                assert (await running)["turns"] == 2
            else:
                with pytest.raises(RoostError) as failed:
                    await running
                assert failed.value.reason is reason
            assert not tasks(mesh), "at once, not some time later"
            assert len(list(mesh.data_dir("edge-north").glob("jails/*"))) == 1


async def test_a_daemon_that_is_killed_leaves_no_task_and_the_turn_is_applied_once(tmp_path: Path) -> None:
    async with running_mesh(tmp_path / "mesh", [NORTH]) as mesh:
        await mesh.deploy(runner(tmp_path, run='start = "exec"'))
        async with mesh.client() as client:
            await ask(client)
            running = asyncio.create_task(ask(client, python("import time; time.sleep(4); print('done')")))
            await eventually(lambda: tasks(mesh) == 1, 10.0, "the task runs")
            daemon = mesh.daemon("edge-north").pid
            os.kill(daemon, signal.SIGKILL)
            answer = await running
            assert mesh.daemon("edge-north").pid != daemon
            assert (answer["turns"], answer["results"][0]["stdout"]) == (1, "done\n"), (
                "run again, by a new process"
            )
            assert not tasks(mesh)


async def test_tasks_run_no_longer_than_their_node_is_the_owner(tmp_path: Path) -> None:
    async with running_mesh(tmp_path / "mesh", [NORTH, CLOUD]) as mesh:
        await mesh.deploy(runner(tmp_path, run='start = "exec"\nturn_timeout = "40s"'))
        async with mesh.client() as client:
            await ask(client)
            busy = python("import time; time.sleep(30)", cpu=0.1)
            cut_off = asyncio.create_task(ask(client, busy))
            await eventually(lambda: tasks(mesh) == 1, 10.0, "the task runs")
            mesh.coordinators[0].suspend()
            try:
                await eventually(lambda: not tasks(mesh), TTL, "its end: nobody knows the owner")
            finally:
                mesh.coordinators[0].resume()
            with suppress(RoostError):
                answer = await cut_off
                assert answer["results"][0].get("error") == "NODE_SUSPENDED"
            await mesh.wait_up("edge-north")
            await ask(client)
            instance = await mesh.instance("runner", "ana")
            assert instance is not None
            taken = asyncio.create_task(ask(client, busy))
            await eventually(lambda: tasks(mesh, instance.node) == 1, 10.0, "the task runs")
            await mesh.take_away("runner", "ana")
            await eventually(lambda: not tasks(mesh, instance.node), 3.0, "its end: another is the owner")
            taken.cancel()
