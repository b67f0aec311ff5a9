"""System tests run real parts as root, and leave nothing behind."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import leftovers


@pytest.fixture(autouse=True)
def _nothing_is_left_behind(tmp_path: Path) -> Iterator[None]:
    before = leftovers.count(tmp_path)
    yield
    deadline = time.monotonic() + 5.0  # the kernel takes namespaces down in the background
    while (left := leftovers.count(tmp_path).since(before)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


@pytest.fixture(autouse=True)
def _needs_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("jails need root")
