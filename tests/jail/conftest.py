"""Tests of the jail on the real kernel. `running_jailer` sees to it that each leaves nothing behind."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.support.jailer import RunningJailer, is_root, running_jailer


@pytest.fixture
async def jailer() -> AsyncIterator[RunningJailer]:
    if not is_root():
        pytest.skip("jails need root")
    async with running_jailer() as jailer:
        yield jailer
