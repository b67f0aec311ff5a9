"""The proxy of one jail, on loopback and without the jail: what goes through, what is refused and how, and
what breaks. Jails are in tests/jail/test_egress.py."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from edge_agent.config import CredentialConfig
from edge_agent.egress.addresses import networks
from edge_agent.egress.credentials import Credentials
from edge_agent.egress.gate import ALLOWED, MOST, USUAL, Bounds, Gate
from edge_agent.egress.outside import Outside
from edge_agent.egress.rules import Why
from shared.identity import InstanceKey
from shared.network_policy import Allow, NetworkSection, Upstream
from tests.support.eventually import eventually
from tests.support.web import Authority, Web, running_web

KEY = InstanceKey("default", "chef", "ana")
SECRET = "sk-very-secret-0123456789"


@dataclass
class Bench:
    web: Web
    tls: Web
    gate: Gate
    port: int
    trust: ssl.SSLContext
    names: dict[str, list[str]]
    owner: list[bool] = field(default_factory=lambda: [True])

    async def ask(self, request: str | bytes) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the answer to a whole request."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        data = request if isinstance(request, bytes) else request.encode()
        try:
            async with asyncio.timeout(10.0):
                writer.write(data)
                await writer.drain()
                head, _, body = (await reader.read(-1)).partition(b"\r\n\r\n")
        finally:
            writer.close()
        top, *lines = head.decode().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        return int(top.split()[1]), headers, body

    async def get(self, url: str, host: str = "", *lines: str) -> tuple[int, dict[str, str], bytes]:
        host = host or url.split("/")[2]
        return await self.ask("\r\n".join((f"GET {url} HTTP/1.1", f"Host: {host}", *lines, "", "")))

    async def refused(self, url: str) -> Why:
        status, headers, body = await self.get(url)
        told = json.loads(body)
        assert set(told) == {"reason", "message", "hint"}
        assert status >= 400
        assert headers["roost-reason"] == told["reason"]
        return Why(told["reason"])

    async def tunnel(self, host: str, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(f"CONNECT {host}:{port} HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n".encode())
        head = await reader.readuntil(b"\r\n\r\n")
        assert b" 200 " in head, head
        return reader, writer

    async def over_tls(self, host: str, name: str | None, path: str = "/") -> bytes:
        reader, writer = await self.tunnel(host, self.tls.port)
        try:
            async with asyncio.timeout(10.0):
                self.trust.check_hostname = name is not None
                await writer.start_tls(self.trust, server_hostname=name)
                writer.write(f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
                return await reader.read(-1)
        finally:
            writer.close()


@asynccontextmanager
async def running(directory: Path, bounds: Bounds = USUAL) -> AsyncIterator[Bench]:
    authority = Authority(directory)
    (directory / "openai").write_text(SECRET)
    certificate = authority.certificate("api.example.com", "b.example.com", "127.0.0.1")
    async with running_web() as web, running_web(certificate) as tls:
        names = {
            "api.example.com": ["127.0.0.1"],
            "b.example.com": ["127.0.0.1"],
            "web.example.com": ["127.0.0.1"],
            "rebound.example.com": ["127.0.0.1"],
            "metadata.example.com": ["169.254.169.254"],
            "dead.example.com": ["127.0.0.2"],
        }

        async def resolve(host: str) -> Sequence[str]:
            if host not in names:
                raise socket.gaierror(-2, "Name or service not known")
            return names[host]

        network = NetworkSection(
            allow=(
                *(Allow(h, ports=(tls.port,), private=True) for h in ("api.example.com", "b.example.com")),
                Allow("127.0.0.1", ports=(tls.port, web.port)),
                Allow("web.example.com", ports=(web.port,), private=True),
                Allow("rebound.example.com", ports=(web.port,)),
                Allow("metadata.example.com", ports=(80,), private=True),
                Allow("dead.example.com", ports=(web.port,), private=True),
                Allow("nowhere.example.com", ports=(80,), private=True),
            ),
            upstream=(
                Upstream("llm", f"https://api.example.com:{tls.port}/v1", "openai", private=True),
                Upstream("stolen", f"https://b.example.com:{tls.port}/v1", "openai", private=True),
                Upstream("untrusted", f"https://web.example.com:{tls.port}", private=True),
                Upstream("other", f"https://api.example.com:{tls.port}/v1", "missing", private=True),
            ),
        )
        rule = CredentialConfig("openai", f"https://api.example.com:{tls.port}/v1", ("default/chef",))
        missing = CredentialConfig("missing", f"https://api.example.com:{tls.port}/v1", ("default/chef",))
        outside = Outside(networks(["127.0.0.0/8"]), authority.file, resolve)
        listening = socket.create_server(("127.0.0.1", 0))
        listening.setblocking(False)
        port = listening.getsockname()[1]
        owner = [True]
        proxy = Gate(
            listening,
            KEY,
            network,
            lambda: owner[0],
            outside,
            Credentials(directory, (rule, missing)),
            asyncio.Semaphore(1000),
            bounds,
        )
        trust = ssl.create_default_context(cafile=str(authority.file))
        try:
            yield Bench(web, tls, proxy, port, trust, names, owner)
        finally:
            await asyncio.gather(*proxy.close(), return_exceptions=True)
            outside.close()


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with running(tmp_path) as bench:
        yield bench


# --- plain HTTP ------------------------------------------------------------------------------------------


async def test_a_plain_request_and_its_answer(bench: Bench) -> None:
    status, headers, body = await bench.get(f"http://web.example.com:{bench.web.port}/x?y=1")
    assert (status, body, headers["connection"]) == (200, b"hello", "close")
    seen = bench.web.seen[0]
    assert (seen.method, seen.target) == ("GET", "/x?y=1")
    assert seen.headers["host"] == f"web.example.com:{bench.web.port}"
    assert bench.gate.counts == {ALLOWED: 1}


@pytest.mark.parametrize("framing", ["Content-Length: 200000", "Transfer-Encoding: chunked"])
async def test_bodies_go_both_ways(bench: Bench, framing: str) -> None:
    body = b"0123456789" * 20_000
    data = body if "Length" in framing else b"30d40\r\n" + body + b"\r\n0\r\n\r\n"
    head = f"POST http://web.example.com:{bench.web.port}/echo HTTP/1.1\r\n"
    head += f"Host: web.example.com:{bench.web.port}\r\nExpect: 100-continue\r\n{framing}\r\n\r\n"
    status, headers, answer = await bench.ask(head.encode() + data)
    assert (status, headers) == (100, {})
    final, _, got = answer.partition(b"\r\n\r\n")
    assert final.startswith(b"HTTP/1.1 200")
    assert got == body


async def test_what_follows_a_request_on_its_connection_is_never_sent_on(bench: Bench) -> None:
    host = f"web.example.com:{bench.web.port}"
    one = f"GET http://{host}/a HTTP/1.1\r\nHost: {host}\r\n\r\n"
    status, _, body = await bench.ask(
        one + one.replace("/a", "/b") + "GET http://evil.example/ HTTP/1.1\r\n\r\n"
    )
    assert (status, body) == (200, b"hello")
    assert [seen.target for seen in bench.web.seen] == ["/a"]


async def test_a_redirect_is_the_agents_to_follow_and_is_refused(bench: Bench) -> None:
    status, headers, _ = await bench.get(f"http://web.example.com:{bench.web.port}/moved")
    assert (status, headers["location"]) == (302, "http://evil.example/")
    assert await bench.refused("http://evil.example/") is Why.HOST_DENIED


@pytest.mark.parametrize(("path", "reason"), [("/garbage", Why.UPSTREAM_BROKEN), ("/silence", Why.TIMED_OUT)])
async def test_a_target_that_answers_with_no_http(tmp_path: Path, path: str, reason: Why) -> None:
    async with running(tmp_path, Bounds(idle_seconds=0.5)) as bench:
        assert await bench.refused(f"http://web.example.com:{bench.web.port}{path}") is reason


async def test_half_an_answer_does_not_look_whole(bench: Bench) -> None:
    with pytest.raises(ConnectionError):
        await bench.get(f"http://web.example.com:{bench.web.port}/cut")


async def test_a_body_that_makes_no_sense_is_not_a_request(bench: Bench) -> None:
    head = f"POST http://web.example.com:{bench.web.port}/echo HTTP/1.1\r\n"
    head += f"Host: web.example.com:{bench.web.port}\r\nTransfer-Encoding: chunked\r\n\r\n"
    for body in (
        "xyz\r\n",
        "-1\r\n",
        "5\r\nhelloGET / HTTP/1.1\r\n\r\n",
        "1" * 30 + "\r\n",
        "0x5\r\nhello\r\n",
    ):
        status, headers, _ = await bench.ask(head + body)
        assert (status, headers["roost-reason"]) == (400, "BAD_REQUEST"), body
    assert all(not seen.body or seen.body == b"hello" for seen in bench.web.seen)


async def test_a_refused_upload_gets_to_read_why(bench: Bench) -> None:
    head = "POST http://evil.example/ HTTP/1.1\r\nHost: evil.example\r\nContent-Length: 4000000\r\n\r\n"
    status, headers, _ = await bench.ask(head.encode() + b"x" * 4_000_000)
    assert (status, headers["roost-reason"]) == (403, "HOST_DENIED")


# --- where names lead --------------------------------------------------------------------------------------


async def test_a_name_that_leads_to_this_machine_or_a_metadata_service_leads_nowhere(bench: Bench) -> None:
    assert await bench.refused(f"http://rebound.example.com:{bench.web.port}/") is Why.ADDRESS_DENIED
    assert await bench.refused("http://metadata.example.com/") is Why.ADDRESS_DENIED
    assert bench.web.seen == []


async def test_a_name_is_resolved_once_for_each_request(bench: Bench) -> None:
    asked = []
    original = bench.gate._outside._resolve

    async def resolve(host: str) -> Sequence[str]:
        asked.append(host)
        return await original(host) if len(asked) == 1 else ["169.254.169.254"]

    bench.gate._outside._resolve = resolve
    assert (await bench.get(f"http://web.example.com:{bench.web.port}/"))[0] == 200
    assert asked == ["web.example.com"]


async def test_names_and_addresses_that_are_not_there(bench: Bench) -> None:
    assert await bench.refused("http://nowhere.example.com/") is Why.NAME_UNKNOWN
    assert await bench.refused(f"http://dead.example.com:{bench.web.port}/") is Why.UNREACHABLE


# --- tunnels -----------------------------------------------------------------------------------------------


async def test_a_tunnel_carries_tls_to_the_host_that_it_names(bench: Bench) -> None:
    assert (await bench.over_tls("api.example.com", "api.example.com")).endswith(b"hello")
    assert bench.tls.names == ["api.example.com"]
    assert bench.gate.counts == {ALLOWED: 1}
    assert bench.gate.traffic.out > 200 < bench.gate.traffic.back


async def test_a_tunnel_to_an_address_names_none(bench: Bench) -> None:
    assert (await bench.over_tls("127.0.0.1", "127.0.0.1")).endswith(b"hello")
    with pytest.raises(ssl.SSLError):
        await bench.over_tls("127.0.0.1", "api.example.com")


@pytest.mark.parametrize("name", ["b.example.com", "evil.example", "127.0.0.1"])
async def test_another_name_within_is_refused_also_one_that_is_allowed(
    bench: Bench, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO), pytest.raises((ssl.SSLError, ConnectionError)) as refused:
        await bench.over_tls("api.example.com", name)
    assert "name" in str(refused.value).lower()
    assert bench.gate.counts == {Why.NAME_MISMATCH: 1}
    assert bench.tls.names == [] == bench.tls.seen
    assert "NAME_MISMATCH CONNECT api.example.com" in caplog.text


@pytest.mark.parametrize(
    "data", [b"SSH-2.0-OpenSSH_9.0\r\n", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x00\x00"]
)
async def test_a_tunnel_is_for_tls_alone(bench: Bench, data: bytes) -> None:
    reader, writer = await bench.tunnel("api.example.com", bench.tls.port)
    writer.write(data)
    assert (await reader.read(-1))[:1] == b"\x15", "a TLS alert"
    writer.close()
    assert bench.gate.counts == {Why.NOT_TLS: 1}


async def test_a_tunnel_in_which_nothing_is_said_ends(tmp_path: Path) -> None:
    async with running(tmp_path, Bounds(head_seconds=0.3)) as bench:
        reader, writer = await bench.tunnel("api.example.com", bench.tls.port)
        assert (await reader.read(-1))[:1] == b"\x15"
        writer.close()


# --- upstreams and credentials -----------------------------------------------------------------------------


async def test_a_named_upstream_gets_the_credential_that_the_jail_never_sees(bench: Bench) -> None:
    status, headers, body = await bench.get("http://llm.roost/headers", "", "Authorization: Bearer dummy")
    assert status == 200
    seen = bench.tls.seen[0]
    assert (seen.target, seen.headers["authorization"]) == ("/v1/headers", f"Bearer {SECRET}")
    assert seen.headers["host"] == f"api.example.com:{bench.tls.port}"
    assert bench.tls.names == ["api.example.com"]
    told = json.loads(body)
    assert told["authorization"] == "Bearer " + "*" * len(SECRET), (
        "the server repeats it; the jail gets stars"
    )
    assert SECRET not in f"{headers}{body!r}"


async def test_a_credential_is_not_spent_elsewhere(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    assert await bench.refused("http://stolen.roost/chat") is Why.CREDENTIAL_DENIED
    assert await bench.refused("http://other.roost/chat") is Why.CREDENTIAL_MISSING
    assert await bench.refused("http://llm.roost/../admin") is Why.BAD_REQUEST
    assert await bench.refused("http://unknown.roost/") is Why.HOST_DENIED
    assert bench.tls.seen == []
    assert SECRET not in caplog.text


async def test_an_upstreams_certificate_is_checked(bench: Bench) -> None:
    assert await bench.refused("http://untrusted.roost/") is Why.UNREACHABLE


# --- ownership and limits ----------------------------------------------------------------------------------


async def test_nothing_leaves_while_the_node_does_not_own_the_instance(bench: Bench) -> None:
    bench.owner[0] = False
    assert await bench.refused(f"http://web.example.com:{bench.web.port}/") is Why.NOT_OWNER
    status, headers, _ = await bench.ask(
        f"CONNECT api.example.com:{bench.tls.port} HTTP/1.1\r\n\r\n".replace("1.1", "1.0")
    )
    assert (status, headers["roost-reason"]) == (503, "NOT_OWNER")
    assert bench.web.open_now == bench.tls.open_now == 0


@pytest.mark.parametrize("how", ["cut", "doubt"])
@pytest.mark.parametrize("through", ["plain", "tunnel"])
async def test_a_download_is_cut_when_the_instance_is_lost(bench: Bench, how: str, through: str) -> None:
    reader, writer = await _endless(bench, through)
    web = bench.web if through == "plain" else bench.tls
    async with asyncio.timeout(10.0):
        await reader.read(1000)
        if how == "cut":
            bench.gate.cut()
        else:
            bench.owner[0] = False
        with pytest.raises((ConnectionError, ssl.SSLError)):
            await reader.read(-1)
    await eventually(lambda: web.open_now == 0, 5.0, "the target's end of it")
    passed = web.endless_bytes
    await asyncio.sleep(0.1)
    assert web.endless_bytes == passed
    writer.close()


async def _endless(bench: Bench, through: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if through == "plain":
        reader, writer = await asyncio.open_connection("127.0.0.1", bench.port)
        host = f"web.example.com:{bench.web.port}"
        writer.write(f"GET http://{host}/endless HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    else:
        reader, writer = await bench.tunnel("api.example.com", bench.tls.port)
        await writer.start_tls(bench.trust, server_hostname="api.example.com")
        writer.write(b"GET /endless HTTP/1.1\r\nHost: api.example.com\r\n\r\n")
    return reader, writer


async def test_a_hundred_connections_at_once(bench: Bench) -> None:
    url = f"http://web.example.com:{bench.web.port}/"
    answers = await asyncio.gather(
        *(bench.get(url) for _ in range(100)),
        *(bench.get("http://llm.roost/x") for _ in range(20)),
        *(bench.get("http://evil.example/") for _ in range(20)),
    )
    assert [status for status, _, _ in answers] == [200] * 120 + [403] * 20
    assert bench.gate.counts == {ALLOWED: 120, Why.HOST_DENIED: 20}


async def test_connections_beyond_the_limit_wait_for_others_to_end(bench: Bench) -> None:
    held = [await _endless(bench, "plain") for _ in range(MOST)]
    for reader, _ in held:
        await reader.read(10)
    waiting = asyncio.create_task(bench.get(f"http://web.example.com:{bench.web.port}/"))
    await asyncio.sleep(0.3)
    assert not waiting.done()
    held[0][1].close()
    assert (await waiting)[0] == 200
    for _, writer in held:
        writer.close()


async def test_a_slow_reader_fills_nobodys_memory(bench: Bench) -> None:
    body = b"x" * (32 << 20)
    head = f"POST http://web.example.com:{bench.web.port}/echo HTTP/1.1\r\n"
    head += f"Host: web.example.com:{bench.web.port}\r\nContent-Length: {len(body)}\r\n\r\n"
    _, writer = await asyncio.open_connection("127.0.0.1", bench.port, limit=1024)
    writer.write(head.encode() + body)
    await writer.drain()
    await eventually(lambda: bench.web.seen and len(bench.web.seen[0].body) == len(body), 30.0)
    await asyncio.sleep(0.2)
    assert bench.gate.traffic.back < 16 << 20, "the answer waits in the kernel and at its source"
    writer.close()


async def test_a_head_without_end(bench: Bench) -> None:
    endless = b"GET http://a.example/ HTTP/1.1\r\nX: " + b"x" * 100_000
    status, headers, _ = await bench.ask(endless)
    assert (status, headers["roost-reason"]) == (431, "HEAD_TOO_LARGE")


async def test_a_head_that_does_not_go_on(tmp_path: Path) -> None:
    async with running(tmp_path, Bounds(head_seconds=0.3)) as bench:
        status, headers, _ = await bench.ask(b"GET http://a.exam")
    assert (status, headers["roost-reason"]) == (400, "BAD_REQUEST")


async def test_a_flood_is_counted_but_not_logged_without_end(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        for _ in range(80):
            await bench.get("http://evil.example/?secret=1")
    assert bench.gate.counts == {Why.HOST_DENIED: 80}
    lines = [r for r in caplog.records if r.name == "edge_agent.egress.gate"]
    assert len(lines) == 51
    assert "default/chef/ana: HOST_DENIED GET http://evil.example:80/" in lines[0].getMessage()
    assert "secret" not in caplog.text


async def test_connections_come_at_a_bounded_rate(tmp_path: Path) -> None:
    loop = asyncio.get_running_loop()
    async with running(tmp_path, Bounds(rate=20)) as bench:
        began = loop.time()
        await asyncio.gather(*(bench.get("http://evil.example/") for _ in range(50)))
        assert loop.time() - began > 1.5


async def test_clients_that_leave_are_no_matter(bench: Bench) -> None:
    for data in (b"", b"GET http://", f"CONNECT api.example.com:{bench.tls.port} HTTP/1.0\r\n\r\n".encode()):
        _, writer = await asyncio.open_connection("127.0.0.1", bench.port)
        writer.write(data)
        writer.close()
    await eventually(lambda: not bench.gate._connections, 5.0)
    assert (await bench.get(f"http://web.example.com:{bench.web.port}/"))[0] == 200
    assert bench.gate.counts == {ALLOWED: 1}
