"""A coordinator with a mistake: `python -m tests.faults.broken_coordinator --variant NAME --config FILE`."""

from __future__ import annotations

import sys

from coordinator.__main__ import main
from tests.faults.variants import break_coordinator

if __name__ == "__main__":
    break_coordinator(sys.argv[2])
    sys.exit(main(sys.argv[3:]))
