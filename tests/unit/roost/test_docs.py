"""The pages for developers say what is so."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from shared.config import Duration, Size
from shared.network_policy import Allow, Upstream
from shared.policy import (
    AgentSection,
    Durability,
    ResourcesSection,
    RunSection,
    Start,
    StateSection,
    TasksSection,
    parse_policy,
)
from shared.units import parse_duration, parse_size

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "agent-toml.md").read_text()
SECTIONS = {
    "agent": AgentSection,
    "run": RunSection,
    "resources": ResourcesSection,
    "tasks": TasksSection,
    "state": StateSection,
    "[network.allow]": Allow,
    "[network.upstream]": Upstream,
}


def rows(section: str) -> dict[str, str]:
    """Key to default, as the section's table has them."""
    text = PAGE.split(f"## [{section}]")[1].split("\n## ")[0]
    return dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", text, re.MULTILINE))


@pytest.mark.parametrize("section", SECTIONS)
def test_the_page_lists_every_key_with_its_default(section: str) -> None:
    told = rows(section)
    fields = {field.name: field for field in dataclasses.fields(SECTIONS[section])}
    assert list(told) == list(fields)
    for name, field in fields.items():
        if field.default is dataclasses.MISSING:
            assert told[name] == "required"
        else:
            assert value(told[name].strip("`"), str(field.type)) == field.default


def value(text: str, kind: str) -> object:
    bare = text.strip('"')
    readers = {
        Duration.__name__: parse_duration,
        Size.__name__: parse_size,
        "str": str,
        "float": float,
        "int": int,
        Start.__name__: Start,
        Durability.__name__: Durability,
        "bool": lambda text: text == "true",
        "tuple[str, ...]": lambda text: tuple(text.strip("[]").split()),
        "tuple[int, ...]": lambda text: tuple(int(part) for part in text.strip("[]").split()),
    }
    return readers[kind](bare)


def test_its_example_has_every_key_and_is_valid() -> None:
    example = PAGE.split("```toml\n")[1].split("```")[0]
    parse_policy(example)
    for section in SECTIONS.values():
        for field in dataclasses.fields(section):
            assert re.search(rf"^(# )?{field.name} = ", example, re.MULTILINE), field.name


def test_its_commented_keys_are_valid_in_place_of_the_entry() -> None:
    example = PAGE.split("```toml\n")[1].split("```")[0]
    run = parse_policy(re.sub(r"^(entry = .*\n|# )", "", example, flags=re.MULTILINE)).run
    assert (run.command, run.port) == (("node", "server.js"), 8080)


def test_the_first_agent_on_the_page_is_the_example() -> None:
    page = (ROOT / "docs" / "first-agent.md").read_text()
    assert (ROOT / "examples" / "hello" / "hello.py").read_text() in page
