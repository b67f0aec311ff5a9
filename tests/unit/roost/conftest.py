"""The chef's files stand alone, as in a jail: its directory is on the path, not in a package."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3] / "examples" / "chef"))
