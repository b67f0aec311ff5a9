"""The same agent in any other sandbox: a line in, a line out, until the input ends."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

here = Path(__file__).parent
sys.path[:0] = [str(here), str(here / "site-packages")]

from assistant import reply  # noqa: E402

for line in sys.stdin:
    print(asyncio.run(reply(line.rstrip("\n"))), flush=True)
