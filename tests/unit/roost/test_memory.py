"""What a zygote does with its memory before it forks."""

from __future__ import annotations

import pytest

from roost._memory import fill_holes


@pytest.mark.parametrize("size", [48, 128, 512])
def test_what_is_made_when_the_holes_are_filled_lies_side_by_side(size: int) -> None:
    scattered = [bytes(size - 33) for _ in range(1000)]
    del scattered[::2]
    kept = fill_holes()
    made = [bytes(size - 33) for _ in range(20)]
    beside = sum(id(b) - id(a) == size for a, b in zip(made, made[1:], strict=False))  # noqa: RUF007
    assert beside > 12
    assert kept
