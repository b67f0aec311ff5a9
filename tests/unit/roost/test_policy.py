"""agent.toml's [run]: what goes together, and what does not."""

from __future__ import annotations

import pytest

from shared.errors import Reason, RoostError
from shared.policy import Policy, parse_policy


def policy(run: str) -> Policy:
    return parse_policy(f'[agent]\nname = "a"\n[run]\n{run}')


@pytest.mark.parametrize(
    "run",
    [
        'entry = "a:b"',
        'entry = "a:b"\nstart = "parked"',
        'command = ["node", "server.js"]',
        'command = ["./server"]\nport = 8080\npath = "/chat?x=%20"\nstart = "exec"',
    ],
)
def test_good(run: str) -> None:
    policy(run)


@pytest.mark.parametrize(
    ("run", "told"),
    [
        ("", "either entry"),
        ('entry = "a:b"\ncommand = ["x"]', "either entry"),
        ('entry = "a"', "module:object"),
        ("command = []", "either entry"),
        ('command = [""]', "begin with a program"),
        ('command = ["-x"]', "begin with a program"),
        ('command = ["A=b", "x"]', "begin with a program"),
        ('command = ["x", "\\u0000"]', "NUL"),
        (f"command = {['x'] * 65}", "at most 64"),
        ('command = "node server.js"', "must be a list"),
        ('command = ["x"]\nstart = "zygote"', "always executed"),
        ('command = ["x"]\nstart = "parked"', "always executed"),
        ('entry = "a:b"\nport = 8080', "port needs a command"),
        ('command = ["x"]\nport = 80', "1024 to 65535"),
        ('command = ["x"]\nport = 65536', "1024 to 65535"),
        ('command = ["x"]\nport = -1', "1024 to 65535"),
        ('command = ["x"]\nport = "8080"', "a whole number"),
        ('command = ["x"]\npath = "/x"', "without port"),
        ('command = ["x"]\nport = 8080\npath = "x"', "begin with /"),
        ('command = ["x"]\nport = 8080\npath = "/x\\r\\nHost: y"', "begin with /"),
        ('command = ["x"]\nport = 8080\npath = "/a b"', "begin with /"),
        ('command = ["x"]\nports = 8080', "unknown key 'ports'"),
    ],
)
def test_bad(run: str, told: str) -> None:
    with pytest.raises(RoostError) as caught:
        policy(run)
    assert caught.value.reason is Reason.AGENT_INVALID
    assert told in caught.value.message
