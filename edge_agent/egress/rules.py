"""May it leave? Decided from plain values: a policy and what was asked for.

Always true: what `agent.toml` does not name is refused; a refusal says why, to a machine and to the agent's
developer, and holds nothing that the agent did not write itself or could not read in its own `agent.toml`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from urllib.parse import urlsplit

from shared.network_policy import (
    UPSTREAM_DOMAIN,
    Allow,
    NetworkSection,
    Upstream,
    is_address,
    is_host,
    is_tame,
)

_HTTP_PORT, _HTTPS_PORT = 80, 443


class Why(StrEnum):
    """Of a refusal, for machines: the `reason` in the answer, and what is counted."""

    BAD_REQUEST = "BAD_REQUEST"  # not HTTP, or HTTP that two readers could understand differently
    HEAD_TOO_LARGE = "HEAD_TOO_LARGE"
    HOST_DENIED = "HOST_DENIED"
    PORT_DENIED = "PORT_DENIED"
    METHOD_DENIED = "METHOD_DENIED"
    PATH_DENIED = "PATH_DENIED"
    ADDRESS_DENIED = "ADDRESS_DENIED"  # the name leads to an address that may not be reached
    NOT_TLS = "NOT_TLS"
    NAME_MISMATCH = "NAME_MISMATCH"  # Host header or TLS server name say something else than the target
    CREDENTIAL_DENIED = "CREDENTIAL_DENIED"
    CREDENTIAL_MISSING = "CREDENTIAL_MISSING"
    NAME_UNKNOWN = "NAME_UNKNOWN"  # the resolver knows no such name
    UNREACHABLE = "UNREACHABLE"
    TIMED_OUT = "TIMED_OUT"
    UPSTREAM_BROKEN = "UPSTREAM_BROKEN"  # what came back is no HTTP
    NOT_OWNER = "NOT_OWNER"  # the node does not know any more that it owns the instance


_STATUS = {
    Why.BAD_REQUEST: 400,
    Why.HEAD_TOO_LARGE: 431,
    Why.CREDENTIAL_MISSING: 502,
    Why.NAME_UNKNOWN: 502,
    Why.UNREACHABLE: 502,
    Why.UPSTREAM_BROKEN: 502,
    Why.TIMED_OUT: 504,
    Why.NOT_OWNER: 503,
}


class Denied(Exception):
    def __init__(self, why: Why, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.why = why
        self.message = message
        self.hint = hint

    @property
    def status(self) -> int:
        return _STATUS.get(self.why, 403)


@dataclass(frozen=True, slots=True)
class Tunnel:
    """CONNECT."""

    host: str
    port: int


@dataclass(frozen=True, slots=True)
class Plain:
    """A request in plain HTTP. `path` begins with / and has no query."""

    method: str
    host: str
    port: int
    path: str


@dataclass(frozen=True, slots=True)
class Target:
    """Where it may go. `path`: what comes before the one that was asked for. `credential`: to be added."""

    host: str
    port: int
    tls: bool
    private: bool
    path: str = ""
    credential: str = ""
    name: str = ""  # of the upstream

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (_HTTPS_PORT if self.tls else _HTTP_PORT) else f"{host}:{self.port}"


def decide(asked: Tunnel | Plain, network: NetworkSection) -> Target:
    """Denied if it may not leave."""
    upstream = _upstream_named(asked.host, network)
    if upstream is not None:
        return _to_upstream(asked, upstream)
    entries = [entry for entry in network.allow if _names(entry, asked.host)]
    if not entries:
        raise Denied(
            Why.HOST_DENIED,
            f"this agent may not reach {asked.host}",
            f'if it should, name it in agent.toml: [[network.allow]] host = "{asked.host}"',
        )
    entries = [entry for entry in entries if asked.port in entry.ports]
    if not entries:
        raise Denied(
            Why.PORT_DENIED,
            f"this agent may not reach port {asked.port} of {asked.host}",
            f"if it should, add {asked.port} to the ports of that host in agent.toml",
        )
    if isinstance(asked, Tunnel):
        entries = [entry for entry in entries if not entry.http_only]
        if not entries:
            raise Denied(
                Why.METHOD_DENIED,
                f"what goes to {asked.host} through a tunnel can't be checked for its methods and paths",
                "ask for http:// URLs, or allow the host without methods and paths in agent.toml",
            )
        return _target(asked, entries, tls=True)
    return _target(asked, _allowing(asked, entries), tls=False)


def _target(asked: Tunnel | Plain, entries: list[Allow], tls: bool) -> Target:
    private = any(entry.private or (entry.host == asked.host and is_address(asked.host)) for entry in entries)
    return Target(asked.host, asked.port, tls, private)


def _names(entry: Allow, host: str) -> bool:
    if entry.host.startswith("*."):
        return host.endswith(entry.host[1:]) and not is_address(host)
    return entry.host == host


def _allowing(asked: Plain, entries: list[Allow]) -> list[Allow]:
    by_method = [entry for entry in entries if not entry.methods or asked.method in entry.methods]
    if not by_method:
        raise _unlike(Why.METHOD_DENIED, asked, "methods")
    by_path = [entry for entry in by_method if matches(asked.path, entry.paths)]
    if not by_path:
        raise _unlike(Why.PATH_DENIED, asked, "paths")
    return by_path


def _unlike(why: Why, asked: Plain, what: str) -> Denied:
    return Denied(
        why,
        f"this agent may not {asked.method} {asked.path[:200]} at {asked.host}",
        f"agent.toml names the {what} that it may use there",
    )


def matches(path: str, patterns: tuple[str, ...]) -> bool:
    """Without patterns, any path."""
    return not patterns or any(
        path.startswith(pattern[:-1]) if pattern.endswith("*") else path == pattern for pattern in patterns
    )


def _upstream_named(host: str, network: NetworkSection) -> Upstream | None:
    """Denied for a name in the domain of upstreams that is none."""
    name, _, domain = host.rpartition(".")
    if domain != UPSTREAM_DOMAIN:
        return None
    for upstream in network.upstream:
        if upstream.name == name:
            return upstream
    known = ", ".join(u.name for u in network.upstream) or "none"
    raise Denied(
        Why.HOST_DENIED,
        f"this agent has no upstream {name}; there are: {known}",
        "agent.toml names them: [[network.upstream]]",
    )


def _to_upstream(asked: Tunnel | Plain, upstream: Upstream) -> Target:
    if isinstance(asked, Tunnel):
        raise Denied(
            Why.METHOD_DENIED,
            f"{asked.host} is an upstream, which is asked in plain HTTP",
            f"write http://{asked.host}/: the node's proxy speaks TLS from there on",
        )
    if asked.port != _HTTP_PORT:
        raise Denied(Why.PORT_DENIED, f"{asked.host} has no port {asked.port}", f"write http://{asked.host}/")
    if upstream.methods and asked.method not in upstream.methods:
        raise _unlike(Why.METHOD_DENIED, asked, "methods")
    if not matches(asked.path, upstream.paths):
        raise _unlike(Why.PATH_DENIED, asked, "paths")
    parts = urlsplit(upstream.url)
    tls = parts.scheme == "https"
    host = parts.hostname or ""
    return Target(
        host,
        parts.port or (_HTTPS_PORT if tls else _HTTP_PORT),
        tls,
        upstream.private or is_address(host),
        parts.path.rstrip("/"),
        upstream.credential,
        upstream.name,
    )


def parse_authority(text: str, default_port: int | None) -> tuple[str, int]:
    """Host, in lower case and without a final dot, and port of `host`, `host:port` or `[address]:port`.
    Denied for anything else; without `default_port` there must be one."""
    host, colon, port = text.rpartition(":")
    if not colon or text.endswith("]"):
        host, port = text, ""
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1] if ":" in host else ""
    elif ":" in host:
        host = ""
    host = host.lower().removesuffix(".")
    number = default_port if (not port and not colon) or text.endswith("]") else _port(port)
    if number is None or not is_host(host):
        raise Denied(Why.BAD_REQUEST, f"{text[:200]!r} is no host and port")
    return host, number


def _port(text: str) -> int | None:
    ok = text.isascii() and text.isdecimal() and len(text) <= 5 and 0 < int(text) < 65_536
    return int(text) if ok else None


def parse_plain(method: str, target: str) -> tuple[Plain, str]:
    """What is asked for by a request line in plain HTTP, and its path with the query. Denied if it is not a
    whole http:// URL."""
    scheme, found, rest = target.partition("://")
    if not found or scheme.lower() != "http":
        hint = "ask for it by CONNECT" if scheme.lower() == "https" else "this is a proxy: ask for whole URLs"
        raise Denied(Why.BAD_REQUEST, f"{target[:200]!r} is no http:// URL", hint)
    slash = min((i for i in (rest.find("/"), rest.find("?")) if i >= 0), default=len(rest))
    host, port = parse_authority(rest[:slash], _HTTP_PORT)
    full = rest[slash:] if rest[slash : slash + 1] == "/" else "/" + rest[slash:]
    path, _, _ = full.partition("?")
    if not (full.isascii() and full.isprintable()) or " " in full or "#" in full or not is_tame(path):
        raise Denied(
            Why.BAD_REQUEST,
            f"the path {path[:200]!r} could mean different things to different readers",
            "write it without .. and without characters that have no place in a URL",
        )
    return Plain(method, host, port, path), full


def check_agrees(what: str, said: str, host: str, port: int, default_port: int) -> None:
    """Denied if `said`, of a Host header, is another host or port than the target's."""
    if parse_authority(said, default_port) != (host, port):
        raise Denied(
            Why.NAME_MISMATCH,
            f"the {what} says {said[:200]!r}, but the target is {host}:{port}",
            "both must name the same host",
        )
