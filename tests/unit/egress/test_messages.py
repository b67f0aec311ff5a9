"""HTTP between an agent and the proxy: what is refused, and what is written anew."""

from __future__ import annotations

import json

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.egress.credentials import Addition
from edge_agent.egress.messages import (
    Scrubber,
    read_request,
    refusal,
    request_to_send,
    response_to_send,
)
from edge_agent.egress.rules import Denied, Plain, Tunnel, Why

SECRET = b"sk-very-secret-0123456789"


def head(*lines: str) -> bytes:
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"


def sent(data: bytes, addition: Addition | None = None) -> dict[str, str]:
    """Headers of what goes on to the target."""
    request = read_request(data)
    event = request_to_send(request, request.target, "a.example", addition)
    wire = h11.Connection(h11.CLIENT).send(event)
    assert wire is not None
    assert wire.count(b"\r\n\r\n") == 1
    lines = wire.decode("latin-1").split("\r\n")[1:-2]
    names = [line.partition(":")[0].lower() for line in lines]
    for once in ("host", "connection", "content-length", "transfer-encoding", "authorization"):
        assert names.count(once) <= 1
    return dict(zip(names, (line.partition(": ")[2] for line in lines), strict=True))


def test_requests_that_a_proxy_gets() -> None:
    asked = read_request(head("CONNECT A.example:443 HTTP/1.1", "Host: a.example:443")).asked
    assert asked == Tunnel("a.example", 443)
    assert read_request(head("CONNECT a.example:443 HTTP/1.0")).asked == Tunnel("a.example", 443)
    request = read_request(head("GET http://a.example/x?y=1 HTTP/1.1", "Host: a.example"))
    assert (request.asked, request.target) == (Plain("GET", "a.example", 80, "/x"), "/x?y=1")
    assert read_request(head("GET http://a.example:81/ HTTP/1.1", "Host: a.example:81")).asked.port == 81


@pytest.mark.parametrize(
    "data",
    [
        head("GET http://a.example/ HTTP/1.1", "Host: b.example"),
        head("GET http://a.example/ HTTP/1.1", "Host: a.example:81"),
        head("CONNECT a.example:443 HTTP/1.1", "Host: b.example:443"),
    ],
)
def test_a_host_header_of_somebody_else(data: bytes) -> None:
    with pytest.raises(Denied) as denied:
        read_request(data)
    assert denied.value.why is Why.NAME_MISMATCH


OK = "POST http://a.example/ HTTP/1.1", "Host: a.example"


@pytest.mark.parametrize(
    "data",
    [
        head(*OK, "Content-Length: 5", "Transfer-Encoding: chunked"),
        head(*OK, "Transfer-Encoding: chunked", "Content-Length: 5"),
        head(*OK, "Content-Length: 5", "Content-Length: 6"),
        head(*OK, "Content-Length: 5, 6"),
        head(*OK, "Content-Length: +5"),
        head(*OK, "Content-Length: 0x5"),
        head(*OK, "Content-Length: -1"),
        head(*OK, "Transfer-Encoding: gzip, chunked"),
        head(*OK, "Transfer-Encoding: chunked", "Transfer-Encoding: chunked"),
        head(*OK, "Transfer-Encoding: identity"),
        head(*OK, "Transfer-Encoding : chunked"),
        head(*OK, "Transfer-Encoding: \x0bchunked"),
        head("POST http://a.example/ HTTP/1.0", "Transfer-Encoding: chunked"),
        head(*OK, "Host: a.example"),
        head(*OK, "Host: b.example"),
        head("GET http://a.example/ HTTP/1.1"),
        head(*OK, "X: a", " folded"),
        head(*OK, "X: a", "\tfolded"),
        head(*OK, " X: a"),
        head(OK[0], " Host: a.example"),
        head(*OK, "X\x00: a"),
        head(*OK, "X: a\x00b"),
        head(*OK, "X: a\rY: b"),
        head(*OK, "X: a\nTransfer-Encoding: chunked"),
        b"GET http://a.example/ HTTP/1.1\nHost: a.example\r\n\r\n",
        b"\r\n" + head(*OK),
        b" " + head(*OK),
        head("GET  http://a.example/ HTTP/1.1", OK[1]),
        head("GET http://a.example/ x HTTP/1.1", OK[1]),
        head("GET http://a.example/ HTTP/2.0", OK[1]),
        head("GET http://a.example/"),
        head("G\u00e9T http://a.example/ HTTP/1.1", OK[1]),
        head("GET /x HTTP/1.1", OK[1]),
        head("GET https://a.example/ HTTP/1.1", OK[1]),
        head("OPTIONS * HTTP/1.1", OK[1]),
        head("CONNECT a.example HTTP/1.1", OK[1]),
        head("CONNECT http://a.example:443/ HTTP/1.1", OK[1]),
        head("PRI * HTTP/2.0"),
        b"\x16\x03\x01\x00\xa5\x01\r\n\r\n",
        b"\r\n\r\n",
    ],
)
def test_what_two_readers_could_understand_differently_is_refused(data: bytes) -> None:
    with pytest.raises(Denied) as denied:
        read_request(data)
    assert denied.value.why is Why.BAD_REQUEST
    assert denied.value.status == 400


@given(st.binary(max_size=200), st.integers(0, 60))
def test_whatever_comes_is_a_request_or_refused(garbage: bytes, position: int) -> None:
    good = head("GET http://a.example/x HTTP/1.1", "Host: a.example", "X: y")
    for data in (garbage + b"\r\n\r\n", good[:position] + garbage + good[position:]):
        whole = data.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"  # as it is read from a connection
        try:
            request = read_request(whole)
        except Denied as denied:
            assert refusal(denied).count(b"\r\n\r\n") == 1
            continue
        if isinstance(request.asked, Plain):
            headers = sent(whole)
            assert headers["host"] == "a.example"
            assert not {"transfer-encoding", "content-length"} <= headers.keys()


def test_headers_of_one_connection_stay_there() -> None:
    headers = sent(
        head(
            *OK,
            "Connection: keep-alive, X-Mine",
            "X-Mine: 1",
            "Keep-Alive: 5",
            "Proxy-Authorization: Basic x",
            "Proxy-Connection: close",
            "TE: trailers",
            "Upgrade: websocket",
            "Expect: 100-continue",
            "X-Kept: 2",
            "Content-Length: 3",
        )
    )
    assert headers == {"host": "a.example", "x-kept": "2", "content-length": "3", "connection": "close"}


def test_a_body_keeps_its_length_whatever_connection_names() -> None:
    headers = sent(head(*OK, "Connection: content-length, host", "Content-Length: 3"))
    assert headers == {"host": "a.example", "content-length": "3", "connection": "close"}


@pytest.mark.parametrize("name", [b"Authorization", b"X-Api-Key"])
def test_a_credential_takes_the_place_of_what_the_agent_sent(name: bytes) -> None:
    headers = sent(
        head(
            *OK,
            "Authorization: Bearer dummy",
            "x-api-key: dummy",
            "Cookie: a=b",
            "Accept-Encoding: gzip",
            "Connection: authorization, x-api-key",
        ),
        Addition(name, b"Bearer " + SECRET, SECRET),
    )
    assert headers[name.decode().lower()] == "Bearer " + SECRET.decode()
    assert "dummy" not in str(headers)
    assert headers["accept-encoding"] == "identity"
    assert "cookie" not in headers


def test_a_refusal_says_it_where_clients_look() -> None:
    text = refusal(Denied(Why.HOST_DENIED, "not to évil\r\nX: y", "do this"))
    top, _, body = text.partition(b"\r\n\r\n")
    lines = top.decode().split("\r\n")
    assert lines[0] == "HTTP/1.1 403 HOST_DENIED: not to ?vil??X: y"
    assert "Roost-Reason: HOST_DENIED" in lines
    assert "X: y" not in lines
    assert json.loads(body) == {
        "reason": "HOST_DENIED",
        "message": "not to évil\r\nX: y",
        "hint": "do this",
    }
    assert f"Content-Length: {len(body)}" in lines


def test_every_reason_has_a_status() -> None:
    statuses = {why: Denied(why, "").status for why in Why}
    assert {statuses[Why.HOST_DENIED], statuses[Why.UNREACHABLE], statuses[Why.TIMED_OUT]} == {403, 502, 504}
    assert all(400 <= status < 600 for status in statuses.values())


def test_a_response_is_passed_on_without_the_secret() -> None:
    response = h11.Response(
        status_code=401,
        headers=[("X-Echo", b"Bearer " + SECRET), ("Content-Length", "5"), ("Keep-Alive", "1")],
    )
    passed = response_to_send(response, Scrubber(SECRET))
    assert dict(passed.headers) == {
        b"x-echo": b"Bearer " + b"*" * len(SECRET),
        b"content-length": b"5",
        b"connection": b"close",
    }


@given(st.lists(st.sampled_from([b"a", SECRET[:1], SECRET[:5], SECRET, SECRET[5:], b"\n"])), st.data())
def test_a_secret_is_found_in_however_many_pieces(parts: list[bytes], data: st.DataObject) -> None:
    whole = b"".join(parts)
    scrubber, passed, position = Scrubber(SECRET), b"", 0
    while position < len(whole):
        size = data.draw(st.integers(1, len(whole)))
        passed += scrubber.feed(whole[position : position + size])
        position += size
    passed += scrubber.end()
    assert passed == whole.replace(SECRET, b"*" * len(SECRET))


def test_what_can_not_be_a_secret_is_not_held_back() -> None:
    scrubber = Scrubber(SECRET)
    assert scrubber.feed(b"data: hello\n\n") == b"data: hello\n\n"
    assert scrubber.feed(b"x sk-") == b"x "
    assert scrubber.feed(b"ip") == b"sk-ip"
