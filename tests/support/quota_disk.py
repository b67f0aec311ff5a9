"""A jailer whose data lies on a file system with user quotas, in an image that only it has mounted:
`python -m tests.support.quota_disk IMAGE edge.toml PROGRAM ...`. Whatever ends it, the mount and its loop
device go, too."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from edge_agent.config import EdgeConfig
from edge_agent.jail import kernel
from shared import config
from tests.support import run_jailer

SIZE = "192M"


def make_image(path: Path) -> str:
    """Why there can be none here; empty if there is one."""
    for command in (
        ["truncate", "-s", SIZE, str(path)],
        ["mkfs.ext4", "-q", "-O", "quota", "-E", "quotatype=usrquota", str(path)],
        ["unshare", "--mount", "mount", "-o", "loop,usrquota", str(path), "/mnt"],
    ):
        try:
            done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
        except FileNotFoundError:
            return f"there is no {command[0]}"
        if done.returncode != 0:
            return f"{command[0]}: {done.stderr.strip()}"
    return ""


def main() -> None:
    image = sys.argv.pop(1)
    data_dir = config.load_file(EdgeConfig, Path(sys.argv[1])).data_dir
    kernel.unshare(kernel.CLONE_NEWNS)
    kernel.mount("none", "/", kernel.MS_REC | kernel.MS_PRIVATE)
    data_dir.mkdir()
    subprocess.run(["mount", "-o", "loop,usrquota", image, str(data_dir)], check=True, timeout=30)
    bundle = data_dir / "bundles" / "v1"  # the test's own would lie beneath the mount
    bundle.mkdir(parents=True)
    (bundle / "hello.txt").write_text("hello")
    run_jailer.main()


if __name__ == "__main__":
    main()
