"""What may leave: policies, and what is asked for."""

from __future__ import annotations

import string
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.egress.rules import (
    Denied,
    Plain,
    Target,
    Tunnel,
    Why,
    check_agrees,
    decide,
    parse_authority,
    parse_plain,
)
from shared.errors import Reason, RoostError
from shared.network_policy import Allow, NetworkSection, Upstream, is_host, is_tame
from shared.policy import parse_policy

NETWORK = NetworkSection(
    allow=(
        Allow("api.example.com"),
        Allow("web.example.com", ports=(80, 8080)),
        Allow("read.example.com", ports=(80,), methods=("GET",), paths=("/v1/*", "/status")),
        Allow("read.example.com", ports=(80,), methods=("POST",), paths=("/v1/items",)),
        Allow("*.wild.example.com", ports=(443, 80)),
        Allow("10.0.0.7", ports=(9000,)),
        Allow("intra.example.com", private=True),
    ),
    upstream=(
        Upstream("llm", "https://api.example.com/v1", "openai"),
        Upstream("local", "http://10.0.0.5:11434", paths=("/api/*",), methods=("POST",)),
    ),
)


def why(asked: Tunnel | Plain) -> Why:
    with pytest.raises(Denied) as denied:
        decide(asked, NETWORK)
    assert denied.value.message
    return denied.value.why


@pytest.mark.parametrize(
    ("asked", "target"),
    [
        (Tunnel("api.example.com", 443), Target("api.example.com", 443, True, False)),
        (Plain("GET", "web.example.com", 80, "/"), Target("web.example.com", 80, False, False)),
        (Plain("PUT", "web.example.com", 8080, "/any"), Target("web.example.com", 8080, False, False)),
        (Plain("GET", "read.example.com", 80, "/v1/x/y"), Target("read.example.com", 80, False, False)),
        (Plain("GET", "read.example.com", 80, "/status"), Target("read.example.com", 80, False, False)),
        (Plain("POST", "read.example.com", 80, "/v1/items"), Target("read.example.com", 80, False, False)),
        (Tunnel("a.wild.example.com", 443), Target("a.wild.example.com", 443, True, False)),
        (Tunnel("a.b.wild.example.com", 443), Target("a.b.wild.example.com", 443, True, False)),
        (Plain("GET", "10.0.0.7", 9000, "/"), Target("10.0.0.7", 9000, False, True)),
        (Tunnel("intra.example.com", 443), Target("intra.example.com", 443, True, True)),
        (
            Plain("POST", "llm.roost", 80, "/chat"),
            Target("api.example.com", 443, True, False, "/v1", "openai", "llm"),
        ),
        (
            Plain("POST", "local.roost", 80, "/api/chat"),
            Target("10.0.0.5", 11434, False, True, "", "", "local"),
        ),
    ],
)
def test_what_is_named_may_leave(asked: Tunnel | Plain, target: Target) -> None:
    assert decide(asked, NETWORK) == target


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (Tunnel("evil.example", 443), Why.HOST_DENIED),
        (Tunnel("example.com", 443), Why.HOST_DENIED),
        (Tunnel("api.example.com.evil.example", 443), Why.HOST_DENIED),
        (Tunnel("xapi.example.com", 443), Why.HOST_DENIED),
        (Tunnel("wild.example.com", 443), Why.HOST_DENIED),
        (Tunnel("evilwild.example.com", 443), Why.HOST_DENIED),
        (Tunnel("api.example.com", 22), Why.PORT_DENIED),
        (Plain("GET", "api.example.com", 80, "/"), Why.PORT_DENIED),
        (Tunnel("read.example.com", 80), Why.METHOD_DENIED),
        (Plain("DELETE", "read.example.com", 80, "/v1/x"), Why.METHOD_DENIED),
        (Plain("get", "read.example.com", 80, "/v1/x"), Why.METHOD_DENIED),
        (Plain("GET", "read.example.com", 80, "/v2/x"), Why.PATH_DENIED),
        (Plain("GET", "read.example.com", 80, "/status/x"), Why.PATH_DENIED),
        (Plain("POST", "read.example.com", 80, "/v1/other"), Why.PATH_DENIED),
        (Plain("GET", "nobody.roost", 80, "/"), Why.HOST_DENIED),
        (Plain("GET", "a.llm.roost", 80, "/"), Why.HOST_DENIED),
        (Plain("GET", "roost", 80, "/"), Why.HOST_DENIED),
        (Plain("GET", "llm.roost", 8080, "/"), Why.PORT_DENIED),
        (Tunnel("llm.roost", 443), Why.METHOD_DENIED),
        (Plain("GET", "local.roost", 80, "/api/chat"), Why.METHOD_DENIED),
        (Plain("POST", "local.roost", 80, "/admin"), Why.PATH_DENIED),
    ],
)
def test_all_else_is_refused_and_the_reason_said(asked: Tunnel | Plain, reason: Why) -> None:
    assert why(asked) is reason


def test_a_policy_without_a_network_lets_nothing_out() -> None:
    with pytest.raises(Denied):
        decide(Tunnel("api.example.com", 443), NetworkSection())
    assert not NetworkSection().any
    assert NETWORK.any


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("Api.Example.COM:443", ("api.example.com", 443)),
        ("api.example.com.:443", ("api.example.com", 443)),
        ("[2001:db8::1]:443", ("2001:db8::1", 443)),
        ("10.0.0.7:9000", ("10.0.0.7", 9000)),
    ],
)
def test_authorities(text: str, parsed: tuple[str, int]) -> None:
    assert parse_authority(text, None) == parsed


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        ":443",
        "a",
        "a:",
        "a:0",
        "a:65536",
        "a:+443",
        "a: 443",
        "a:٣",
        "a:443:443",
        "user@a:443",
        "a b:443",
        "[::1]",
        "::1:443",
        "[a]:443",
        "[::1:443",
        "a..b:443",
        "-a.b:443",
        "a/b:443",
        "127.1:443",
        "0x7f.1:443",
        "2130706433:443",
        "0177.0.0.1:443",
        "a%00:443",
        "a\x00:443",
        "ä.example:443",
        "[fe80::1%eth0]:443",
    ],
)
def test_what_is_no_authority_is_refused(text: str) -> None:
    with pytest.raises(Denied) as denied:
        parse_authority(text, None)
    assert denied.value.why is Why.BAD_REQUEST


@pytest.mark.parametrize(
    ("target", "asked", "full"),
    [
        ("http://a.example/x?q=1", Plain("GET", "a.example", 80, "/x"), "/x?q=1"),
        ("HTTP://A.example:8080", Plain("GET", "a.example", 8080, "/"), "/"),
        ("http://a.example?q=/../", Plain("GET", "a.example", 80, "/"), "/?q=/../"),
        (
            "http://a.example/a%20b/%C3%A9%E4%BD%A0",
            Plain("GET", "a.example", 80, "/a%20b/%C3%A9%E4%BD%A0"),
            None,
        ),
    ],
)
def test_whole_urls(target: str, asked: Plain, full: str | None) -> None:
    assert parse_plain("GET", target) == (asked, full or asked.path)


@pytest.mark.parametrize(
    "target",
    [
        "/x",
        "*",
        "",
        "https://a.example/",
        "ftp://a.example/",
        "http://",
        "http:///x",
        "http://u:p@a.example/",
        "http://a.example/../x",
        "http://a.example/v1/%2e%2e/x",
        "http://a.example/v1/%252e%252e/x",
        "http://a.example/v1/..%2fx",
        "http://a.example/v1/..\\x",
        "http://a.example/..;a=b/x",
        "http://a.example/x#y",
        "http://a.example/x y",
        "http://a.example/é",
        "http://a.example/%00",
        "http://a.example/%0d%0aX:%20y",
        "http://a.example/.",
        "http://a.example/v1/%5c..%5cx",
    ],
)
def test_urls_that_could_mean_two_things_are_refused(target: str) -> None:
    with pytest.raises(Denied) as denied:
        parse_plain("GET", target)
    assert denied.value.why is Why.BAD_REQUEST


def test_a_host_header_agrees_or_is_refused() -> None:
    check_agrees("Host header", "A.example:80", "a.example", 80, 80)
    check_agrees("Host header", "a.example", "a.example", 443, 443)
    for said in ("b.example", "a.example:81", "a.example.b", "a.example, b.example", ""):
        with pytest.raises(Denied):
            check_agrees("Host header", said, "a.example", 80, 80)


_hosts = st.text(string.ascii_lowercase + string.digits + ".-_*:[]%@/\\ é", max_size=40)


@given(_hosts, st.integers(0, 70_000))
def test_only_what_the_policy_names_is_ever_a_target(host: str, port: int) -> None:
    named = {entry.host for entry in NETWORK.allow}
    for asked in (Tunnel(host, port), Plain("GET", host, port, "/")):
        try:
            target = decide(asked, NETWORK)
        except Denied:
            continue
        assert target.host == host
        assert host in named or host.endswith(".wild.example.com")
        assert any(port in entry.ports for entry in NETWORK.allow)


@given(st.text(max_size=60))
def test_an_authority_that_is_taken_is_a_host_and_a_port(text: str) -> None:
    try:
        host, port = parse_authority(text, None)
    except Denied:
        return
    assert is_host(host)
    assert 0 < port < 65_536
    again = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    assert parse_authority(again, None) == (host, port)


@given(
    st.lists(st.sampled_from([".", "..", "a", "%2e", "%2E", "/", "%2f", "\\", "%5c", ";", "%", "25", "2e"]))
)
def test_a_tame_path_stays_where_it_lies_for_every_reader(parts: list[str]) -> None:
    path = "/" + "".join(parts)
    if not is_tame(path):
        return
    for _ in range(6):
        path = unquote(path)
        assert ".." not in path.replace("\\", "/").split("/")


@pytest.mark.parametrize(
    "text",
    [
        'allow = [{host = "*"}]',
        'allow = [{host = "*.com"}]',
        'allow = [{host = "A.example"}]',
        'allow = [{host = "http://a.example"}]',
        'allow = [{host = "a.example:443"}]',
        'allow = [{host = "127.1"}]',
        'allow = [{host = "x.roost"}]',
        'allow = [{host = "a.example", ports = []}]',
        'allow = ["a.example"]',
        'allow = [{host = "a.example", ports = [0]}]',
        'allow = [{host = "a.example", methods = ["get"]}]',
        'allow = [{host = "a.example", methods = ["CONNECT"]}]',
        'allow = [{host = "a.example", paths = ["v1"]}]',
        'allow = [{host = "a.example", paths = ["/a*b"]}]',
        'allow = [{host = "a.example", paths = ["/../x"]}]',
        'allow = [{host = "a.example", port = 443}]',
        'allow = [{host = "*.10.0.0.1"}]',
        'upstream = [{name = "a"}]',
        'upstream = [{name = "A", url = "https://a.example"}]',
        'upstream = [{name = "a", url = "a.example"}]',
        'upstream = [{name = "a", url = "ftp://a.example"}]',
        'upstream = [{name = "a", url = "https://u@a.example"}]',
        'upstream = [{name = "a", url = "https://a.b/?q"}]',
        'upstream = [{name = "a", url = "https://a.b/../c"}]',
        'upstream = [{name = "a", url = "https://a.b:0"}]',
        'upstream = [{name = "a", url = "https://a.b:x"}]',
        'upstream = [{name = "a", url = "http://a.example", credential = "c"}]',
        'upstream = [{name = "a", url = "https://a.b", credential = "../c"}]',
        'upstream = [{name = "a", url = "https://a.b"}, {name = "a", url = "https://c.d"}]',
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(RoostError) as refused:
        parse_policy(f'[agent]\nname = "a"\n[run]\nentry = "a:a"\n[network]\n{text}\n')
    assert refused.value.reason is Reason.AGENT_INVALID
    assert "network" in refused.value.message


def test_the_proxys_port_is_not_the_agents() -> None:
    run = '[agent]\nname = "a"\n[run]\ncommand = ["node"]\nport = 3128\n'
    parse_policy(run)
    with pytest.raises(RoostError, match="3128"):
        parse_policy(run + '[[network.allow]]\nhost = "a.example"\n')
