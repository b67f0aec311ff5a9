"""Failpoints: off unless asked for, once when armed, and where the list of them says."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared import failpoints
from shared.errors import Reason, RoostError
from shared.failpoints import VARIABLE, enable, failpoint
from tests.support.failpoints import COORDINATOR, NODE, in_source


@pytest.fixture(autouse=True)
def _off_again() -> Iterator[None]:
    yield
    enable({})


def in_child(directory: Path, action: str) -> subprocess.Popen[bytes]:
    code = (
        "import os; from shared import failpoints as f; f.enable(os.environ); f.failpoint('a'); print('past')"
    )
    directory.mkdir()
    (directory / "a").write_text(action)
    return subprocess.Popen(
        [sys.executable, "-c", code], env={VARIABLE: str(directory)}, stdout=subprocess.PIPE, stderr=-3
    )


def test_without_the_variable_nothing_is_looked_at(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("kill")
    failpoint("a")
    assert (tmp_path / "a").exists()


def test_one_that_is_off_costs_next_to_nothing() -> None:
    began = time.perf_counter()
    for _ in range(100_000):
        failpoint("a")
    assert time.perf_counter() - began < 0.5  # 5 us each; it takes 0.05 us on an idle machine


def test_it_acts_once_and_only_the_one_that_is_armed(tmp_path: Path) -> None:
    enable({VARIABLE: str(tmp_path / "points")})
    (tmp_path / "points" / "b").write_text("raise STORE_UNAVAILABLE")
    failpoint("a")
    with pytest.raises(RoostError) as caught:
        failpoint("b")
    assert caught.value.reason is Reason.STORE_UNAVAILABLE
    assert not (tmp_path / "points" / "b").exists()
    failpoint("b")


def test_sleep_stands_still(tmp_path: Path) -> None:
    enable({VARIABLE: str(tmp_path)})
    (tmp_path / "a").write_text("sleep 0.05")
    began = time.monotonic()
    failpoint("a")
    assert time.monotonic() - began >= 0.05


def test_kill_is_the_end(tmp_path: Path) -> None:
    with in_child(tmp_path / "points", "kill") as child:
        assert child.communicate(timeout=20)[0] == b""
    assert child.returncode == -signal.SIGKILL


def test_stop_waits_for_whoever_armed_it(tmp_path: Path) -> None:
    with in_child(tmp_path / "points", "stop") as child:
        deadline = time.monotonic() + 20
        while failpoints_left(tmp_path) or stopped(child.pid) != "T":
            assert time.monotonic() < deadline
        child.send_signal(signal.SIGCONT)
        assert child.communicate(timeout=20)[0] == b"past\n"


def failpoints_left(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "points").iterdir())


def stopped(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_an_unknown_action_is_a_mistake_of_the_test(tmp_path: Path) -> None:
    failpoints.enable({VARIABLE: str(tmp_path)})
    (tmp_path / "a").write_text("explode")
    with pytest.raises(ValueError, match="explode"):
        failpoint("a")


def test_the_places_are_those_that_tests_know() -> None:
    assert sorted(in_source()) == sorted((*COORDINATOR, *NODE)), "each name once, in the source and the list"
    assert len(NODE) >= 12
    assert len(COORDINATOR) >= 8
