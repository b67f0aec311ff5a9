"""Who may spend which credential, and where."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from edge_agent.config import CredentialConfig, EdgeConfig, EgressConfig
from edge_agent.egress.credentials import Credentials
from edge_agent.egress.rules import Denied, Target, Why
from shared import config
from shared.identity import InstanceKey

SECRET = "sk-very-secret-0123456789"
KEY = InstanceKey("default", "chef", "ana")
TARGET = Target("api.example.com", 443, True, False, "/v1", "openai", "llm")
RULE = CredentialConfig("openai", "https://api.example.com/v1", ("default/chef", "acme/*"))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "openai").write_text(SECRET + "\n")
    return tmp_path


def why(
    directory: Path,
    key: InstanceKey = KEY,
    target: Target = TARGET,
    path: str = "/v1/chat",
    rule: object = RULE,
) -> Why:
    assert isinstance(rule, CredentialConfig)
    with pytest.raises(Denied) as denied:
        Credentials(directory, (rule,)).addition(key, target, path)
    assert SECRET not in f"{denied.value} {denied.value.hint}"
    return denied.value.why


def test_it_is_added_for_whom_the_operator_named(directory: Path) -> None:
    credentials = Credentials(directory, (RULE,))
    for key in (KEY, InstanceKey("acme", "any", "ben")):
        added = credentials.addition(key, TARGET, "/v1/chat?stream=1")
        assert (added.name, added.value) == (b"Authorization", f"Bearer {SECRET}".encode())
        assert SECRET not in repr(added)
    (directory / "openai").write_text("another-secret")
    assert credentials.addition(KEY, TARGET, "/v1/chat").value == b"Bearer another-secret"


@pytest.mark.parametrize(
    "key",
    [
        InstanceKey("default", "other", "ana"),
        InstanceKey("other", "chef", "ana"),
        InstanceKey("acme2", "chef", "a"),
    ],
)
def test_nobody_else_spends_it(directory: Path, key: InstanceKey) -> None:
    assert why(directory, key=key) is Why.CREDENTIAL_DENIED


@pytest.mark.parametrize(
    ("target", "path"),
    [
        (Target("evil.example", 443, True, False, "/v1", "openai"), "/v1/chat"),
        (Target("api.example.com.evil.example", 443, True, False, "/v1", "openai"), "/v1/chat"),
        (Target("api.example.com", 8443, True, False, "/v1", "openai"), "/v1/chat"),
        (Target("api.example.com", 443, False, False, "/v1", "openai"), "/v1/chat"),
        (Target("api.example.com", 443, True, False, "", "openai"), "/admin"),
        (Target("api.example.com", 443, True, False, "/v1", "openai"), "/v1-other/x"),
        (Target("api.example.com", 443, True, False, "/v1", "unknown"), "/v1/chat"),
    ],
)
def test_it_goes_nowhere_else_whatever_agent_toml_says(directory: Path, target: Target, path: str) -> None:
    assert why(directory, target=target, path=path) is Why.CREDENTIAL_DENIED


@pytest.mark.parametrize("content", [None, "", "short", "two\nlines of it", "ümlaut-secret", "x" * 10_000])
def test_a_file_that_is_no_credential(
    tmp_path: Path, content: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    if content is not None:
        (tmp_path / "openai").write_text(content)
    with caplog.at_level(logging.ERROR):
        assert why(tmp_path) is Why.CREDENTIAL_MISSING
    assert "openai" in caplog.text
    assert not content or content not in caplog.text


EDGE = 'node = "a"\ndata_dir = "/d"\ncoordinators = ["a:1"]\n'
GOOD = 'credentials_dir = "/c"\ncredential = [{name = "openai", url = "https://a.b", agents = ["default/*"]}]'


def test_edge_toml() -> None:
    egress = config.load(EdgeConfig, f"{EDGE}[egress]\n{GOOD}", "edge.toml").egress
    assert egress == EgressConfig(
        credentials_dir=Path("/c"), credential=(CredentialConfig("openai", "https://a.b", ("default/*",)),)
    )


@pytest.mark.parametrize(
    "text",
    [
        GOOD.replace('credentials_dir = "/c"', ""),
        GOOD.replace("https", "http"),
        GOOD.replace("openai", "../x"),
        GOOD.replace("default/*", "*"),
        GOOD.replace("default/*", "*/*"),
        GOOD.replace("default/*", "default"),
        GOOD.replace("agents", 'header = "Host", agents'),
        GOOD.replace("agents", 'header = "a b", agents'),
        GOOD.replace("agents", 'header = "Transfer-Encoding", agents'),
        GOOD.replace("agents", 'format = "Bearer", agents'),
        GOOD.replace("agents", 'format = "{}{}", agents'),
        GOOD.replace("agents", r'format = "{}\r\nX: y", agents'),
        'private_networks = ["10.0.0.1/8"]',
        'private_networks = ["lan"]',
    ],
)
def test_an_edge_toml_that_makes_no_sense(text: str) -> None:
    with pytest.raises(config.ConfigError, match="egress"):
        config.load(EdgeConfig, f"{EDGE}[egress]\n{text}", "edge.toml")
