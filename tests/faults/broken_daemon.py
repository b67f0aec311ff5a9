"""What `broken_node` starts as its daemon."""

from __future__ import annotations

import sys

from edge_agent.daemon import main
from tests.faults.variants import break_node

if __name__ == "__main__":
    break_node(sys.argv[2])
    del sys.argv[1:3]
    main()
