"""As system tests: as root, and nothing is left behind."""

from __future__ import annotations

from tests.system.conftest import _needs_root, _nothing_is_left_behind

__all__ = ["_needs_root", "_nothing_is_left_behind"]
