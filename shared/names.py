"""What tenants, agents, nodes, sites and credentials may be called."""

from __future__ import annotations

import re

NAME_RULE = "use 1 to 63 of a-z, 0-9 and -, starting with a letter or digit"
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


def is_name(text: str) -> bool:
    return _NAME.fullmatch(text) is not None
