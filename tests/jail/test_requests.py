"""Bad requests: whatever the daemon sends, the jailer and the other jails live on."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest

from edge_agent.jail import protocol
from edge_agent.jail.calls import CallFailed, Calls
from edge_agent.jail.python import python_argv
from shared.errors import Reason, RoostError
from tests.support.jailer import BUNDLE, ECHO, LIMITS, RunningJailer, python, spec

MAKE: dict[str, Any] = {
    "do": "make",
    "jail_id": "a",
    "bundle": BUNDLE,
    "argv": ["/bin/true"],
    "env": [],
    "limits": {"memory_bytes": 64 << 20, "cpu_millis": 1000, "pids": 8},
}


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({"do": "make"}, "missing"),
        ({**MAKE, "jail_id": "../../etc"}, "jail_id"),
        ({**MAKE, "jail_id": 7}, "jail_id"),
        ({**MAKE, "bundle": "../jails"}, "bundle"),
        ({**MAKE, "bundle": "never-unpacked"}, "never-unpacked"),
        ({**MAKE, "argv": []}, "argv"),
        ({**MAKE, "argv": ["true"]}, "absolute"),
        ({**MAKE, "argv": ["/bin/true\0"]}, "NUL"),
        ({**MAKE, "env": ["no equals sign"]}, "NAME=value"),
        ({**MAKE, "limits": {"memory_bytes": 0, "cpu_millis": 1, "pids": 1}}, "memory_bytes"),
        ({**MAKE, "limits": {"memory_bytes": 64 << 20, "cpu_millis": 1000, "pids": 1 << 40}}, "pids"),
        ({**MAKE, "mounts": ["/etc"]}, "unknown key"),
        ({"do": "kill", "jail_id": "no-such"}, "does not run"),
        ({"do": "measure", "jail_id": "../a"}, "jail_id"),
        ({"do": "listen", "jail_id": "no-such", "port": 80}, "does not run"),
        ({"do": "listen", "jail_id": "a", "port": 0}, "no port"),
        ({"do": "connect", "jail_id": "a", "port": 65_536}, "no port"),
        ({"do": "connect", "jail_id": "a", "port": "80"}, "port"),
        ({"do": "discard", "jail_id": ".."}, "jail_id"),
        ({"do": "exec", "argv": ["/bin/sh"]}, "no request"),
        ({"do": ["make"]}, "no request"),
    ],
    ids=str,
)
async def test_a_request_that_is_refused(jailer: RunningJailer, body: dict[str, Any], word: str) -> None:
    calls = Calls(socket.socket(fileno=os.dup(jailer.jailer_socket.fileno())))
    _stop_reading(jailer)
    with pytest.raises(CallFailed, match=word):
        await calls.ask(body, 5.0)
    answer = await calls.ask({"do": "list"}, 5.0)
    assert answer.values == {"jail_ids": []}
    assert not jailer.cgroups()
    calls.close()


def _stop_reading(jailer: RunningJailer) -> None:
    """Two clients on one socket would steal each other's answers."""
    asyncio.get_running_loop().remove_reader(jailer.jailer_socket.fileno())


@pytest.mark.parametrize(
    "garbage",
    [
        b"\xff\xff\xff\xff",
        b"\0\0\0\x05hello",
        b"\0\0\0\x02[]",
        b"\0\0\0\x0a" + b"[" * 10,
        b"GET / HTTP/1.1\r\n",
    ],
    ids=repr,
)
async def test_a_daemon_that_sends_garbage_is_replaced(jailer: RunningJailer, garbage: bytes) -> None:
    jail = await jailer.jails.make(spec("a", python(ECHO)))
    await jail.start()
    jailer.jailer_socket.send(garbage)
    jails = await jailer.reconnect()
    (adopted,) = await jails.adopt()
    await adopted.send(b"unharmed")
    assert await adopted.receive() == b"unharmed"


async def test_a_request_without_an_id_is_ignored(jailer: RunningJailer) -> None:
    text = json.dumps({"do": "list", "id": None}).encode()
    jailer.jailer_socket.send(len(text).to_bytes(4, "big") + text)
    assert await jailer.jails.directories() == []


async def test_a_daemon_that_only_asks_and_never_reads_harms_nobody(jailer: RunningJailer) -> None:
    _stop_reading(jailer)
    text = json.dumps({"do": "directories", "id": 1, "after": ""}).encode()
    frame = len(text).to_bytes(4, "big") + text
    jailer.jailer_socket.setblocking(False)
    sent = 0
    with suppress(BlockingIOError):
        for sent in range(1_000_000):  # noqa: B007
            jailer.jailer_socket.send(frame)
    assert sent < 999_999, "the jailer stopped reading"
    os.kill(jailer.daemon_pid, signal.SIGKILL)
    jails = await jailer.reconnect()
    assert await jails.directories() == []


async def test_a_link_in_place_of_a_bundle_is_refused(jailer: RunningJailer) -> None:
    (jailer.data_dir / "bundles/sly").symlink_to("/etc")
    with pytest.raises(RoostError, match="bind sly") as refused:
        await jailer.jails.make(replace(spec("a", python(ECHO)), bundle="sly"))
    assert refused.value.reason is Reason.JAIL_FAILED
    assert refused.value.hint
    assert not jailer.cgroups()


async def test_a_program_that_is_not_there_is_named(jailer: RunningJailer) -> None:
    jail = await jailer.jails.make(spec("a", ("/agent/no-such-program",)))
    with pytest.raises(RoostError, match="/agent/no-such-program can't be run") as refused:
        await jail.start()
    assert refused.value.hint
    await jail.kill()


async def test_an_agent_that_closes_its_socket_but_goes_on_is_an_error(jailer: RunningJailer) -> None:
    jail = await jailer.jails.make(spec("a", python("_node.close()\nimport time\ntime.sleep(1000)")))
    await jail.start()
    with pytest.raises(RoostError, match="closed its socket") as refused:
        await jail.receive()
    assert refused.value.reason is Reason.AGENT_CRASHED
    await jail.kill()


async def test_a_message_that_is_too_long_is_an_error(jailer: RunningJailer) -> None:
    jail = await jailer.jails.make(spec("a", python("_node.send(b'\\xff' * 8)\nwhile True: recv()")))
    await jail.start()
    with pytest.raises(RoostError, match="announced") as refused:
        await jail.receive()
    assert refused.value.reason is Reason.AGENT_CRASHED
    await jail.kill()


async def test_garbage_to_an_init_ends_the_connection_and_not_the_jail(jailer: RunningJailer) -> None:
    answer = await jailer.jails.ask(
        protocol.Make("a", BUNDLE, python(ECHO), (), protocol.Limits(LIMITS.memory_bytes, 1000, 8)), 10.0
    )
    with socket.socket(fileno=answer.fds[0]) as control:
        control.sendall(b"\xff" * 64)
        control.settimeout(5.0)
        assert control.recv(1) == b""
    os.close(answer.fds[1])
    (adopted,) = await jailer.jails.adopt()
    await adopted.start()
    await adopted.send(b"unharmed")
    assert await adopted.receive() == b"unharmed"


async def test_the_sdk_runs_in_a_jail(jailer: RunningJailer) -> None:
    agent = (
        "from roost import Agent\nagent = Agent()\n@agent.turn\ndef hi(turn):\n    return 'hi ' + turn.user\n"
    )
    jailer.bundle("hello", {"hello.py": agent})
    jail = await jailer.jails.make(replace(spec("a", python_argv("hello:agent")), bundle="hello"))
    await jail.start()
    async with asyncio.timeout(10.0):
        assert json.loads(await jail.receive()) == {"kind": "ready"}
        await jail.send(json.dumps({"kind": "turn", "id": "1", "user": "ana", "message": "?"}).encode())
        assert json.loads(await jail.receive()) == {"kind": "reply", "id": "1", "text": "hi ana"}
