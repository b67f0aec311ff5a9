"""For all tests."""

from __future__ import annotations

import os

# Tests start children while gRPC is in use. They are exec'ed at once, so gRPC need not be made fit for a
# fork, which it does badly: the child may hang before its exec.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
