"""HTTP between an agent and the proxy, as bytes. Pure.

A request is read strictly: what two readers could understand differently is refused, and what is sent on is
written anew from what was understood. One connection carries one request, so nothing can hide behind one.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

import h11

from edge_agent.egress.credentials import Addition
from edge_agent.egress.rules import (
    Denied,
    Plain,
    Tunnel,
    Why,
    check_agrees,
    parse_authority,
    parse_plain,
)

MAX_HEAD = 32 << 10  # bytes of a request's line and headers
MAX_ANSWER_HEAD = 64 << 10

Headers = list[tuple[bytes, bytes]]
_STRAY = re.compile(rb"[^\r]\n|\r[^\n]|\n[ \t]|^\s|\x00")  # bare CR or LF, a folded line, NUL
# Between two neighbours alone, or written anew.
_HOP = frozenset(
    b"connection keep-alive proxy-connection proxy-authorization proxy-authenticate te trailer "
    b"transfer-encoding upgrade expect host content-length".split()
)
_REASON_PHRASE = 200  # characters; many clients show nothing else of a refused CONNECT


@dataclass(frozen=True, slots=True)
class Request:
    """`inside` reads its body. `target`: path and query, of a Plain."""

    asked: Tunnel | Plain
    target: str
    event: h11.Request
    inside: h11.Connection


def read_request(head: bytes) -> Request:
    """`head` ends with the empty line. Denied for anything but one clear request of a proxy."""
    if _STRAY.search(head):
        raise Denied(Why.BAD_REQUEST, "the request's lines are not separated as HTTP wants it")
    inside = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)
    inside.receive_data(head)
    try:
        event = inside.next_event()
    except h11.RemoteProtocolError as error:
        raise Denied(Why.BAD_REQUEST, f"this is no HTTP request: {error}") from error
    if not isinstance(event, h11.Request) or event.http_version not in (b"1.0", b"1.1"):
        raise Denied(Why.BAD_REQUEST, "this is no HTTP request")
    names = [name for name, _ in event.headers]
    if b"transfer-encoding" in names and (b"content-length" in names or event.http_version != b"1.1"):
        raise Denied(Why.BAD_REQUEST, "the request gives the length of its body in two ways")
    method, target = event.method.decode("ascii"), event.target.decode("latin-1")
    said = next((value.decode("latin-1") for name, value in event.headers if name == b"host"), None)
    if method == "CONNECT":
        host, port = parse_authority(target, None)
        if said is not None:
            check_agrees("Host header", said, host, port, port)
        return Request(Tunnel(host, port), "", event, inside)
    asked, full = parse_plain(method, target)
    if said is not None:
        check_agrees("Host header", said, asked.host, asked.port, 80)
    return Request(asked, full, event, inside)


def request_to_send(request: Request, path: str, authority: str, addition: Addition | None) -> h11.Request:
    """What goes on to the target: the agent's own headers, but for those of this connection and those that a
    credential replaces."""
    headers: Headers = [(b"Host", authority.encode())]
    dropped: frozenset[bytes] = frozenset()
    if addition is not None:
        # An answer must not come in a form in which the secret can't be seen.
        dropped = frozenset((addition.name.lower(), b"authorization", b"cookie", b"accept-encoding"))
        headers += [(addition.name, addition.value), (b"Accept-Encoding", b"identity")]
    headers += _passed_on(request.event.headers.raw_items(), dropped)
    for name, value in request.event.headers:
        if name in (b"content-length", b"transfer-encoding"):
            headers.append((name, value))
    headers.append((b"Connection", b"close"))
    return h11.Request(method=request.event.method, target=path.encode(), headers=headers)


def response_to_send(response: h11.Response, scrubber: Scrubber | None) -> h11.Response:
    headers = _passed_on(response.headers.raw_items())
    headers += [(name, value) for name, value in response.headers if name == b"content-length"]
    if scrubber is not None:
        headers = [(scrubber.of_text(name), scrubber.of_text(value)) for name, value in headers]
    headers.append((b"Connection", b"close"))
    return h11.Response(status_code=response.status_code, headers=headers, reason=response.reason)


def _passed_on(headers: Headers, dropped: frozenset[bytes] = frozenset()) -> Headers:
    nominated = {
        token.strip().lower()
        for name, value in headers
        if name.lower() == b"connection"
        for token in value.split(b",")
    }
    return [(n, v) for n, v in headers if n.lower() not in _HOP | nominated | dropped]


def refusal(denied: Denied) -> bytes:
    """A whole response. The status line says it, too: of a refused CONNECT, clients show no more."""
    text = {"reason": denied.why.value, "message": denied.message, "hint": denied.hint}
    body = json.dumps(text).encode() + b"\n"
    line = f"{denied.why}: {denied.message}"[:_REASON_PHRASE]
    phrase = "".join(c if c.isascii() and c.isprintable() else "?" for c in line)
    head = (
        f"HTTP/1.1 {denied.status} {phrase}\r\nContent-Type: application/json\r\n"
        f"Roost-Reason: {denied.why}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body


class Scrubber:
    """Takes a secret out of what comes back, in however many pieces: an API that repeats in an error what it
    was sent would tell the jail. Stars take its place, so that lengths stay."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._stars = b"*" * len(secret)
        self._held = b""

    def of_text(self, text: bytes) -> bytes:
        return text.replace(self._secret, self._stars)

    def feed(self, data: bytes) -> bytes:
        """What can be passed on; an end that could be a secret's beginning is held back."""
        data = (self._held + data).replace(self._secret, self._stars)
        for length in range(min(len(self._secret) - 1, len(data)), 0, -1):
            if self._secret.startswith(data[-length:]):
                self._held = data[-length:]
                return data[:-length]
        self._held = b""
        return data

    def end(self) -> bytes:
        held, self._held = self._held, b""
        return held
