"""Makes the gRPC stubs beside the .proto files whenever the package is built or installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


def generate() -> None:
    protos = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("protos/v1/*.proto"))
    outputs = [f"--{kind}=." for kind in ("python_out", "grpc_python_out", "mypy_out", "mypy_grpc_out")]
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", "-I.", *outputs, *protos], cwd=ROOT, check=True
    )


class BuildWithStubs(build_py):
    def run(self) -> None:
        generate()
        super().run()


if __name__ == "__main__":
    setup(cmdclass={"build_py": BuildWithStubs})
