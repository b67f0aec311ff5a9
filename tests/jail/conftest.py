"""Tests of the jail on the real kernel. Each must leave nothing behind."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Iterator

import pytest

from tests.support import leftovers
from tests.support.jailer import RunningJailer, running_jailer


@pytest.fixture(autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    before = leftovers.count()
    yield
    deadline = time.monotonic() + 5.0  # the kernel takes namespaces down in the background
    while (left := leftovers.count().since(before)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


@pytest.fixture
async def jailer() -> AsyncIterator[RunningJailer]:
    if os.geteuid() != 0:
        pytest.skip("jails need root")
    async with running_jailer() as jailer:
        yield jailer
