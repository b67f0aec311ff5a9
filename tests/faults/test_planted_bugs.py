"""A harness that can't fail proves nothing: it catches each planted bug, by a schedule that Roost passes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.faults.schedules import AIMED_AT, Aim, caught, scene

SLOW = pytest.param(True, marks=pytest.mark.faults, id="slow")


def aims(slow: bool) -> dict[str, Aim]:
    return {variant: aim for variant, aim in AIMED_AT.items() if aim.slow == slow}


@pytest.mark.parametrize("slow", [False, SLOW])
async def test_the_real_daemons_pass(tmp_path: Path, slow: bool) -> None:
    async with scene(tmp_path) as real:
        for variant, aim in aims(slow).items():
            await aim.schedule(real, f"user-{variant}")
        assert await real.verdict() == []
        assert real.workload.outcomes["ok"] >= 3 * len(aims(slow)), "turns were answered, too"


@pytest.mark.parametrize("slow", [False, SLOW])
async def test_each_planted_bug_is_caught(tmp_path: Path, slow: bool) -> None:
    """All at once, for most of the time is spent waiting."""
    variants = list(aims(slow))
    for variant in variants:
        (tmp_path / variant).mkdir()
    found = await asyncio.gather(*(caught(tmp_path / variant, variant) for variant in variants))
    for variant, (was_caught, violations) in zip(variants, found, strict=True):
        assert was_caught, (variant, violations)
