"""A node on a machine whose /proc/meminfo says what a test wants: `python -m tests.support.pretended_memory
MEMINFO --config ...`. In a mount namespace of its own, so nobody else is deceived."""

from __future__ import annotations

import runpy
import sys

from edge_agent.jail import kernel


def main() -> None:
    meminfo = sys.argv.pop(1)
    kernel.unshare(kernel.CLONE_NEWNS)
    kernel.mount("none", "/", kernel.MS_REC | kernel.MS_PRIVATE)
    kernel.attach_tree(kernel.clone_tree(meminfo), "/proc/meminfo")
    runpy.run_module("edge_agent", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
