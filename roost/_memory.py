"""The memory of a zygote, of which each fork begins with all. Standard library alone, Python 3.9."""

from __future__ import annotations

import itertools

_FILL_BYTES, _FILL_AT_MOST = 32 << 10, 16


def shared_memory() -> str:
    """The first mapping whose pages all forks could write to and see; empty if there is none. Without this,
    what one user's instance is made to write there reaches another's."""
    name = ""
    with open("/proc/self/smaps", errors="replace") as file:
        for line in file:
            fields = line.split()
            if fields[0] == "VmFlags:" and "sh" in fields:
                return name
            if not fields[0].endswith(":"):
                name = "shared memory" + (f" ({fields[5]})" if len(fields) > 5 else "")
    return ""


def fill_holes() -> list[object]:
    """Objects that take what is free between others, to be kept. What a fork makes comes to lie side by side
    then; else in holes all over the heap, and it would have to copy a page for each."""
    filled: list[object] = []
    for size in range(16, 513, 16):  # of the interpreter's allocator; larger ones are the C library's
        count = _FILL_BYTES // size
        for _ in range(_FILL_AT_MOST):
            made = [_of_size(size) for _ in itertools.repeat(None, count)]
            filled += made
            adjacent = sum(id(b) - id(a) == size for a, b in zip(made, made[1:]))  # noqa: B905, RUF007
            if adjacent > count * 3 // 4:
                break
    return filled


def _of_size(size: int) -> object:
    """In bytes, and kept by no cache of the interpreter's."""
    if size == 16:
        return object()
    return complex(size) if size == 32 else bytes(size - 33)
