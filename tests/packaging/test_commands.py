"""What the commands say and how they end, with the programs they would call replaced by ones that tell."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PYTEST_SAYS = """
echo "FAILED tests/test_x.py::test_y - assert False"
echo "=================== 1 failed, 2 passed in 0.10s ==================="
echo "make: *** [Makefile:32: test] Error 1" >&2
exit 2
"""


def run(tmp_path: Path, command: list[str], **fakes: str) -> subprocess.CompletedProcess[str]:
    """Runs `command` with shell scripts `fakes`, by name, before all other programs."""
    for name, script in fakes.items():
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    return subprocess.run(
        command, cwd=ROOT, env=env, input="typed", capture_output=True, text=True, timeout=30, check=False
    )


@pytest.mark.parametrize("target", ["demo", "test", "image"])
def test_targets_that_need_root_say_so_and_why(tmp_path: Path, target: str) -> None:
    done = run(tmp_path, ["make", target], id="echo 1000")
    assert done.returncode != 0
    first = done.stderr.splitlines()[0]
    assert first.startswith(f"make {target} must run as root: it installs ")
    assert first.endswith(f"Type: sudo make {target}")


def test_every_target_is_listed_with_what_it_does() -> None:
    listed = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True).stdout
    phony = next(line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith(".PHONY"))
    for target in phony.split()[1:]:
        assert f"make {target} " in listed


def test_ci_ends_with_the_closing_line_of_pytest_and_its_failure(tmp_path: Path) -> None:
    done = run(tmp_path, [".ci/run"], make=PYTEST_SAYS)
    assert done.returncode == 2
    assert (
        done.stdout.splitlines()[-1] == "=================== 1 failed, 2 passed in 0.10s ==================="
    )


def test_ci_succeeds_when_the_tests_do_and_gives_them_no_input(tmp_path: Path) -> None:
    done = run(tmp_path, [".ci/run"], make='echo "$CI $1 [$(cat)]"; echo "=== 3 passed in 0.10s ==="')
    assert done.returncode == 0
    assert done.stdout.splitlines() == ["true test []", "=== 3 passed in 0.10s ==="]


def test_bootstrap_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    done = run(tmp_path, ["packaging/bootstrap.sh", "--everything"])
    assert done.returncode != 0
    assert "unknown argument --everything" in done.stderr
    assert "known are --image, --test, --bench and --vm" in done.stderr
