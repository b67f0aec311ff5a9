"""The server name in a TLS ClientHello, read without decrypting anything. Pure.

What comes is hostile: every length is checked before it is used, and what two readers could understand
differently (two name extensions, two names) is garbage. With Encrypted ClientHello the name seen here is the
outer one: it is as good as a Host header inside the tunnel, which can't be seen either.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

MAX_HELLO = 32 << 10  # bytes, records' headers included
_HANDSHAKE, _CLIENT_HELLO, _SERVER_NAME, _HOST_NAME = 22, 1, 0, 0
_MAX_RECORD = 1 << 14


class NotTls(Exception):
    """What came does not begin with a ClientHello."""


@dataclass(frozen=True, slots=True)
class Hello:
    """`name` in lower case, without a final dot; None: it names no server."""

    name: str | None


def parse(data: bytes) -> Hello | None:
    """None: more is needed. NotTls for anything that is no ClientHello."""
    handshake = b""
    position = 0
    while True:
        if len(handshake) >= 4:
            if handshake[0] != _CLIENT_HELLO:
                raise NotTls("the first message is no ClientHello")
            size = int.from_bytes(handshake[1:4], "big")
            if size > MAX_HELLO:
                raise NotTls("the ClientHello is too large")
            if len(handshake) >= 4 + size:
                return Hello(_name(handshake[4 : 4 + size]))
        header = data[position : position + 5]
        if header[:1] not in (b"", b"\x16") or header[1:2] not in (b"", b"\x03"):
            raise NotTls("it does not begin with a TLS handshake")
        if len(header) < 5:
            break
        size = int.from_bytes(header[3:5], "big")
        if not 0 < size <= _MAX_RECORD:
            raise NotTls("a record of an impossible size")
        handshake += data[position + 5 : position + 5 + size]
        position += 5 + size
        if position > len(data):
            break
    if len(data) >= MAX_HELLO:
        raise NotTls("the ClientHello is too large")
    return None


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    def take(self, size: int) -> bytes:
        part = self._data[self._position : self._position + size]
        if len(part) < size:
            raise NotTls("a length in the ClientHello leads out of it")
        self._position += size
        return part

    def vector(self, length_bytes: int) -> bytes:
        return self.take(int.from_bytes(self.take(length_bytes), "big"))

    @property
    def left(self) -> bool:
        return self._position < len(self._data)


def _name(body: bytes) -> str | None:
    hello = _Reader(body)
    hello.take(2 + 32)  # version, random
    hello.vector(1)  # session
    hello.vector(2)  # ciphers
    hello.vector(1)  # compression
    if not hello.left:
        return None
    extensions = _Reader(hello.vector(2))
    if hello.left:
        raise NotTls("there is something behind the ClientHello's extensions")
    name: str | None = None
    while extensions.left:
        (kind,) = struct.unpack(">H", extensions.take(2))
        content = extensions.vector(2)
        if kind == _SERVER_NAME:
            if name is not None:
                raise NotTls("the ClientHello names two servers")
            name = _host_name(content)
    return name


def _host_name(content: bytes) -> str:
    extension = _Reader(content)
    names = _Reader(extension.vector(2))
    kind = names.take(1)[0]
    text = names.vector(2)
    if kind != _HOST_NAME or names.left or extension.left:
        raise NotTls("the ClientHello's server name is not just one host name")
    if not text or not text.isascii() or not text.decode().isprintable():
        raise NotTls("the ClientHello's server name is not ASCII")
    return text.decode().lower().removesuffix(".")
