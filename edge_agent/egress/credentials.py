"""Secrets that the proxy adds to requests, and that no jail ever sees.

Always true: a credential is sent only below the URL that the node's operator gave it, and only for agents
that the operator named; what an `agent.toml` says can narrow that, never widen it. Its value is in no error,
log line or `repr`. How it can fail: there is no such file, or nothing usable in it; the request is refused,
and the node's log says more than the agent is told.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from edge_agent.config import MAX_CREDENTIAL, CredentialConfig
from edge_agent.egress.rules import Denied, Target, Why
from shared.identity import InstanceKey

log = logging.getLogger(__name__)

_MIN_BYTES = 8  # shorter ones are no secrets, and would be found in answers by chance


@dataclass(frozen=True, slots=True)
class Addition:
    """A header to add. `secret` is the part of `value` that must not come back."""

    name: bytes
    value: bytes = field(repr=False)
    secret: bytes = field(repr=False)


class Credentials:
    """Of a node: files in `directory`, by name, which are read each time."""

    def __init__(self, directory: Path, rules: tuple[CredentialConfig, ...]) -> None:
        self._directory = directory
        self._rules = {rule.name: rule for rule in rules}

    def addition(self, key: InstanceKey, target: Target, path: str) -> Addition:
        """For a request of `key` for `path` (as it is sent) at `target`. Denied if it may not be sent."""
        rule = self._rules.get(target.credential)
        if rule is None or not _is_for(rule, key) or not _is_below(rule.url, target, path):
            raise Denied(
                Why.CREDENTIAL_DENIED,
                f"this node does not send credential {target.credential} for {key.tenant}/{key.agent} "
                f"to {target.authority}{target.path}",
                "the node's operator allows it in edge.toml: [[egress.credential]] with its agents and url",
            )
        secret = self._read(rule.name)
        if secret is None:
            raise Denied(
                Why.CREDENTIAL_MISSING,
                f"this node has no usable credential {rule.name}",
                "the node's operator puts it into credentials_dir of edge.toml; the node's log says more",
            )
        return Addition(rule.header.encode(), rule.format.encode().replace(b"{}", secret), secret)

    def _read(self, name: str) -> bytes | None:
        path = self._directory / name
        try:
            with path.open("rb") as file:
                secret = file.read(MAX_CREDENTIAL + 1).strip()
        except OSError as error:
            log.error("credential %s can't be read: %s", name, error.strerror)  # noqa: TRY400
            return None
        text = secret.decode("latin-1")
        if not _MIN_BYTES <= len(secret) <= MAX_CREDENTIAL or not (text.isascii() and text.isprintable()):
            log.error(
                "credential %s must be one line of %d to %d ASCII characters",
                name,
                _MIN_BYTES,
                MAX_CREDENTIAL,
            )
            return None
        return secret


def _is_for(rule: CredentialConfig, key: InstanceKey) -> bool:
    return f"{key.tenant}/{key.agent}" in rule.agents or f"{key.tenant}/*" in rule.agents


def _is_below(url: str, target: Target, path: str) -> bool:
    parts = urlsplit(url)
    prefix = parts.path.rstrip("/")
    path = path.partition("?")[0]
    return (
        target.tls
        and (target.host, target.port) == (parts.hostname, parts.port or 443)
        and (path == prefix or path.startswith(prefix + "/"))
    )
