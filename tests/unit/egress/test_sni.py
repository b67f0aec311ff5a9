"""The server's name in a ClientHello."""

from __future__ import annotations

import ssl
import struct
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.egress.sni import MAX_HELLO, Hello, NotTls, parse


def real_hello(name: str | None) -> bytes:
    """As OpenSSL makes it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, outgoing, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


def vector(size: int, content: bytes) -> bytes:
    return len(content).to_bytes(size, "big") + content


def extension(kind: int, content: bytes) -> bytes:
    return struct.pack(">H", kind) + vector(2, content)


def server_name(*names: bytes, kind: int = 0) -> bytes:
    return extension(0, vector(2, b"".join(bytes([kind]) + vector(2, name) for name in names)))


def body(extensions: bytes | None) -> bytes:
    start = b"\x03\x03" + bytes(32) + vector(1, b"") + vector(2, b"\x13\x01") + vector(1, b"\0")
    return start if extensions is None else start + vector(2, extensions)


def records(handshake_body: bytes, size: int = 1 << 14, kind: int = 1) -> bytes:
    message = bytes([kind]) + vector(3, handshake_body)
    pieces = [message[i : i + size] for i in range(0, len(message), size)]
    return b"".join(b"\x16\x03\x01" + vector(2, piece) for piece in pieces)


@pytest.mark.parametrize("name", ["api.example.com", "a" * 60 + ".example", None])
def test_a_real_hello_at_any_split(name: str | None) -> None:
    hello = real_hello(name)
    assert parse(hello) == Hello(name)
    assert parse(hello + b"more") == Hello(name)
    for end in range(len(hello)):
        assert parse(hello[:end]) is None


@pytest.mark.parametrize("size", [1, 3, 4, 5, 40, 1 << 14])
def test_a_hello_in_records_of_any_size(size: int) -> None:
    data = records(body(server_name(b"API.example.com.")), size)
    assert parse(data) == Hello("api.example.com")


def test_without_extensions_or_without_a_name() -> None:
    assert parse(records(body(None))) == Hello(None)
    assert parse(records(body(b""))) == Hello(None)
    assert parse(records(body(extension(0xFE0D, b"\0" * 40)))) == Hello(None)


def test_the_outer_name_counts_with_encrypted_hellos() -> None:
    data = records(body(extension(0xFE0D, b"\0" * 40) + server_name(b"outer.example")))
    assert parse(data) == Hello("outer.example")


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n",
        b"SSH-2.0-x\r\n",
        b"\x80\x2e\x01\x03\x01",
        b"\x15\x03\x01\x00\x02\x02\x28",
        b"\x16\x02\x01",
        b"\x16\x03\x01\x00\x00",
        b"\x16\x03\x01\xff\xff",
        records(body(b""), kind=2),
        records(body(server_name(b"a.example") + server_name(b"b.example"))),
        records(body(server_name(b"a.example", b"b.example"))),
        records(body(server_name(b"a.example", kind=1))),
        records(body(server_name(b""))),
        records(body(server_name(b"a\0.example"))),
        records(body(server_name("ä.example".encode()))),
        records(body(extension(0, vector(2, b"\0" + vector(2, b"a.example")) + b"!"))),
        records(body(extension(0, b""))),
        records(body(b"\0")),
        records(body(b"\0\0\0\xff")),
        records(body(b"") + b"!"),
        records(b"\x03\x03"),
        b"\x16\x03\x01" + vector(2, b"\x01\xff\xff\xff"),
    ],
)
def test_what_is_no_hello_or_says_two_things(data: bytes) -> None:
    with pytest.raises(NotTls):
        parse(data)


def test_one_that_never_ends_is_given_up() -> None:
    begun = b"\x16\x03\x01" + vector(2, b"\x01" + (MAX_HELLO - 100).to_bytes(3, "big"))
    filler = (b"\x16\x03\x01\x00\x01\x00" * MAX_HELLO)[: MAX_HELLO - len(begun)]
    assert parse(begun) is None
    with pytest.raises(NotTls):
        parse(begun + filler)


@given(st.binary(max_size=300))
def test_garbage_is_told_or_more_is_needed(data: bytes) -> None:
    for tried in (data, b"\x16\x03\x01" + vector(2, data), records(data), records(body(data))):
        with suppress(NotTls):
            parse(tried)


@given(st.data())
def test_a_hello_with_one_byte_changed(data: st.DataObject) -> None:
    hello = bytearray(records(body(server_name(b"api.example.com") + extension(10, b"\0\2\0\x1d"))))
    hello[data.draw(st.integers(0, len(hello) - 1))] = data.draw(st.integers(0, 255))
    with suppress(NotTls):
        parse(bytes(hello))
