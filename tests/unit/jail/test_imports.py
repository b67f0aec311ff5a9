"""The jailer runs as root, and imports as little as it can."""

from __future__ import annotations

import subprocess
import sys


def test_the_jailer_imports_no_grpc_no_protobuf_and_no_event_loop() -> None:
    code = "import sys, edge_agent.__main__; print(*sys.modules)"
    modules = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=30
    ).stdout.split()
    roots = {name.partition(".")[0] for name in modules}
    assert not roots & {"grpc", "google", "protos", "asyncio", "cryptography", "zstandard", "blake3"}
    outside = {m for m in roots if m not in sys.stdlib_module_names and not m.startswith("_")}
    assert outside <= {"edge_agent", "shared", "cgroupspy"} | _site_hooks()


def _site_hooks() -> set[str]:
    """What .pth files of this environment import into every process."""
    code = "import sys; print(*sys.modules)"
    modules = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=30
    ).stdout.split()
    return {name.partition(".")[0] for name in modules}
