"""What is kept and passed on of an agent's output."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from edge_agent.jail.output import Output


@dataclass
class Stage:
    writable: int
    output: Output
    lines: list[str]
    now: list[float] = field(default_factory=lambda: [0.0])

    def say(self, text: str) -> None:
        os.write(self.writable, text.encode())
        assert self.output.read()


@pytest.fixture
def stage() -> Iterator[Stage]:
    readable, writable = os.pipe()
    lines: list[str] = []
    now = [0.0]
    stage = Stage(writable, Output(readable, "a", lines.append, lambda: now[0]), lines, now)
    yield stage
    os.close(readable)
    os.close(writable)


def test_lines_are_passed_on_when_they_are_whole(stage: Stage) -> None:
    stage.say("one\ntw")
    assert stage.lines == ["[a] one\n"]
    stage.say("o\n")
    assert stage.lines == ["[a] one\n", "[a] two\n"]


def test_what_is_left_at_the_end_is_passed_on_too(stage: Stage) -> None:
    stage.say("no newline")
    os.write(stage.writable, b", and more")
    stage.output.drain()
    assert stage.lines == ["[a] no newline, and more\n"]
    assert stage.output.tail == "no newline, and more"


def test_no_control_character_reaches_the_log(stage: Stage) -> None:
    stage.say("\x1b[2Jcleared\r\x07 grün\n")
    assert stage.lines == ["[a] ·[2Jcleared·· grün\n"]


def test_too_much_a_second_is_left_out_and_that_is_said(stage: Stage) -> None:
    for _ in range(100):
        stage.say("x" * 499 + "\n")
    passed = len(stage.lines)
    assert 30 <= passed <= 40
    stage.now[0] = 1.5
    stage.say("later\n")
    assert stage.lines[passed:] == [
        f"[a] ({100 - passed} lines of output left out: too many a second)\n",
        "[a] later\n",
    ]


def test_the_tail_is_bounded(stage: Stage) -> None:
    for i in range(30):
        stage.say(f"{i}" + "x" * 1000)
    assert len(stage.output.tail) == 4096
    assert stage.output.tail.startswith("x")


def test_a_log_that_takes_nothing_fails_nobody() -> None:
    code = "import os; os.dup2(os.open('/dev/full', os.O_WRONLY), 2); output.to_stderr('word')"
    code = f"from edge_agent.jail import output; {code}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_many_short_lines_are_not_looked_at_one_by_one(stage: Stage) -> None:
    stage.say("\n" * 10_000)
    assert len(stage.lines) <= 256
    stage.now[0] = 1.5
    stage.say("later\n")
    assert f"({10_000 - len(stage.lines) + 2} lines of output left out" in stage.lines[-2]
