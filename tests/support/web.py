"""A web server outside of all jails, on loopback, in plain HTTP or with a certificate of a test's own CA."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import json
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import h11
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

ENDLESS = b"x" * 4096


@dataclass
class Seen:
    method: str
    target: str
    headers: dict[str, str]
    body: bytes = b""


@dataclass
class Web:
    """What paths answer: /endless never ends, /headers shows what came, /echo the body, /cut breaks off in
    the middle, /garbage is no HTTP, /silence says nothing, /moved leads to evil.example, others say hello."""

    port: int = 0
    seen: list[Seen] = field(default_factory=list)
    endless_bytes: int = 0
    open_now: int = 0
    names: list[str | None] = field(default_factory=list)  # that TLS clients asked for

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open_now += 1
        try:
            await self._serve(reader, writer)
        except OSError:
            pass
        finally:
            self.open_now -= 1
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        parser = h11.Connection(h11.SERVER)
        seen: Seen | None = None
        while True:
            try:
                event = parser.next_event()
            except h11.RemoteProtocolError:
                return
            if event is h11.NEED_DATA:
                parser.receive_data(await reader.read(65536))
            elif isinstance(event, h11.Request):
                headers = {n.decode(): v.decode() for n, v in event.headers}
                seen = Seen(event.method.decode(), event.target.decode(), headers)
                self.seen.append(seen)
                if "endless" in seen.target:
                    await self._endless(writer)
                    return
            elif isinstance(event, h11.Data) and seen:
                seen.body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage) and seen:
                await self._answer(seen, parser, writer)
                return
            else:
                return

    async def _endless(self, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n")
        while True:
            writer.write(ENDLESS)
            await writer.drain()
            self.endless_bytes += len(ENDLESS)
            await asyncio.sleep(0.01)

    async def _answer(self, seen: Seen, parser: h11.Connection, writer: asyncio.StreamWriter) -> None:
        status, body, more = 200, b"hello", []
        match seen.target.partition("?")[0].rpartition("/")[2]:
            case "headers":
                body = json.dumps(seen.headers).encode()
            case "echo":
                body = seen.body
            case "cut":
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
                return
            case "garbage":
                writer.write(b"\x00\x01 no HTTP\r\n\r\n")
                return
            case "silence":
                await asyncio.sleep(60)
            case "moved":
                status, more = 302, [("Location", "http://evil.example/")]
        data = parser.send(
            h11.Response(status_code=status, headers=[("Content-Length", str(len(body))), *more])
        )
        writer.write((data or b"") + (parser.send(h11.Data(data=body)) or b""))
        with suppress(OSError):
            await writer.drain()


@asynccontextmanager
async def running_web(certificate: Path | None = None) -> AsyncIterator[Web]:
    """With TLS if a `certificate` (and its key, in one file) is given."""
    web = Web()
    context = None
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        context.sni_callback = lambda _sock, name, _context: web.names.append(name)
    server = await asyncio.start_server(web.serve, "127.0.0.1", 0, ssl=context)
    web.port = server.sockets[0].getsockname()[1]
    try:
        yield web
    finally:
        server.close()


class Authority:
    """A certificate authority: `file` is its certificate."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test authority")])
        certificate = (
            self._builder(self._name, self._key)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.file = directory / "ca.pem"
        self.file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    def certificate(self, *hosts: str) -> Path:
        """A file with a certificate for these names and addresses, and its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        names: list[x509.GeneralName] = []
        for host in hosts:
            try:
                names.append(x509.IPAddress(ipaddress.ip_address(host)))
            except ValueError:
                names.append(x509.DNSName(host))
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0])])
        certificate = (
            self._builder(subject, key)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        file = self._directory / f"{hosts[0]}.pem"
        file.write_bytes(
            certificate.public_bytes(serialization.Encoding.PEM)
            + key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return file

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=2))
        )
