"""For all tests."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

from tests.support.leftovers import MARK

# Tests start children while gRPC is in use. They are exec'ed at once, so gRPC need not be made fit for a
# fork, which it does badly: the child may hang before its exec.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

# Tests' own directories stay where pytest puts them, and so does what they logged.
os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())

# What comes from this run is known by its mark, and has a directory of its own for temporary files.
os.environ[MARK] = os.environ["TMPDIR"] = tempfile.mkdtemp(prefix="roost-tests-")
os.chmod(os.environ["TMPDIR"], 0o755)  # jails' own uids must get to what lies there
tempfile.tempdir = None  # look at TMPDIR again
atexit.register(shutil.rmtree, os.environ[MARK], ignore_errors=True)
