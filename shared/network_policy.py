"""`[network]` of `agent.toml`: what an agent may reach. Nothing that is not named here.

Host names are compared as the agent writes them, in lower case and without a final dot; what they resolve to
is the proxy's business (`edge_agent.egress`).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

from shared.names import NAME_RULE, is_name

PROXY_PORT = 3128  # of 127.0.0.1 in a jail: where it reaches the node's egress proxy
UPSTREAM_DOMAIN = "roost"  # http://NAME.roost/ is the named upstream
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
_METHOD = re.compile(r"[A-Z][A-Z-]{0,19}")
_PATH = re.compile(r"/[!$&-;=@-Z_a-z~%]*\*?")  # printable ASCII of a path; "*" at the end alone
_MOST = 256  # entries


@dataclass(frozen=True, slots=True)
class Allow:
    """A host, or with `*.` before it all names below it but not itself. `methods` or `paths` (exact, or up to
    a final `*`) can only be seen in plain HTTP, so with them there is nothing else. `private`: the name may
    lead to an address that is not of the internet, if the node's operator allows that, too."""

    host: str
    ports: tuple[int, ...] = (443,)
    methods: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    private: bool = False

    def __post_init__(self) -> None:
        if not is_host(self.host.removeprefix("*.")):
            raise ValueError(f'host {self.host!r}: write a name in lower case, like "api.example.com"')
        if self.host.startswith("*.") and ("." not in self.host[2:] or is_address(self.host[2:])):
            raise ValueError(f'host {self.host!r}: write at least two names after "*.", like "*.example.com"')
        if self.host.rpartition(".")[2] == UPSTREAM_DOMAIN:
            raise ValueError(
                f"host {self.host!r}: names in {UPSTREAM_DOMAIN} are those of [[network.upstream]]"
            )
        if not self.ports or not all(0 < port < 65_536 for port in self.ports):
            raise ValueError("ports: name at least one, each from 1 to 65535")
        _check_http(self.methods, self.paths)

    @property
    def http_only(self) -> bool:
        return bool(self.methods or self.paths)


@dataclass(frozen=True, slots=True)
class Upstream:
    """`http://NAME.roost/x` inside is `URL/x` outside, with the node's `credential`, if one is named."""

    name: str
    url: str
    credential: str = ""
    methods: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    private: bool = False

    def __post_init__(self) -> None:
        if not is_name(self.name):
            raise ValueError(f"name {self.name!r}: {NAME_RULE}")
        check_url(self.url)
        if self.credential and not is_name(self.credential):
            raise ValueError(f"credential {self.credential!r}: {NAME_RULE}")
        if self.credential and not self.url.startswith("https:"):
            raise ValueError("url: a credential is sent over https alone")
        _check_http(self.methods, self.paths)


@dataclass(frozen=True, slots=True)
class NetworkSection:
    allow: tuple[Allow, ...] = ()
    upstream: tuple[Upstream, ...] = ()

    def __post_init__(self) -> None:
        if len(self.allow) > _MOST or len(self.upstream) > _MOST:
            raise ValueError(f"there may be {_MOST} entries of each kind")
        names = [upstream.name for upstream in self.upstream]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"upstream: {', '.join(sorted(twice))} is there twice")

    @property
    def any(self) -> bool:
        """May the agent reach anything at all?"""
        return bool(self.allow or self.upstream)


def is_address(host: str) -> bool:
    """An IPv4 or IPv6 address, as it is usually written (IPv6 without brackets)?"""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_host(host: str) -> bool:
    """An address, or a name that can't be taken for one: resolvers take 127.1 and 0x7f.1, too."""
    if is_address(host):
        return str(ipaddress.ip_address(host)) == host and "%" not in host
    labels = host.split(".")
    return (
        len(host) <= 253
        and all(_LABEL.fullmatch(label) for label in labels)
        and not re.fullmatch(r"[0-9]+|0x[0-9a-f]*", labels[-1])
    )


def check_url(url: str) -> None:
    """ValueError for what can't be the beginning of an upstream's URLs."""
    parts = urlsplit(url)
    port = parts.port  # ValueError if it is none
    if parts.scheme not in ("http", "https") or not is_host(parts.hostname or "") or port == 0:
        raise ValueError(f'url {url!r}: write something like "https://api.example.com/v1"')
    if "@" in parts.netloc or parts.query or parts.fragment or "?" in url or "#" in url:
        raise ValueError(f"url {url!r}: it can have no user, no query and no fragment")
    if parts.path and not (_PATH.fullmatch(parts.path) and is_tame(parts.path) and "*" not in parts.path):
        raise ValueError(f"url {url!r}: its path holds what has no place there")


def is_tame(path: str) -> bool:
    """Does it mean the same to everybody? Not with `..`, however it is written: it leads out of where it
    seems to lie."""
    for _ in range(4):
        segments = re.split(r"[/\\]", path)
        if any(segment.partition(";")[0] in (".", "..") for segment in segments):
            return False
        decoded = re.sub(r"%([0-9A-Fa-f]{2})", lambda m: chr(int(m[1], 16)), path)
        if decoded == path:
            return "\\" not in path and not any(character < " " or character == "\x7f" for character in path)
        path = decoded
    return False


def _check_http(methods: Iterable[str], paths: Iterable[str]) -> None:
    for method in methods:
        if not _METHOD.fullmatch(method) or method == "CONNECT":
            raise ValueError(f'methods: {method!r} is none; write them like "GET"')
    for path in paths:
        if not _PATH.fullmatch(path) or not is_tame(path) or "*" in path[:-1]:
            raise ValueError(f'paths: {path!r}: write "/v1/items", or "/v1/*" for all below')
