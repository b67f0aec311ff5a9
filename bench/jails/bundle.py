"""The agent that is started, with its framework in `site-packages`, as a bundle and as a plain directory."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

from shared.wheels import VENDORED

AGENT = Path(__file__).parents[1] / "agents" / "assistant"
_CACHE = Path(__file__).parents[2] / ".cache" / "bench"
_FRAMEWORK = "pydantic-ai-slim>=1,<3"


def assemble(directory: Path) -> Path:
    """The agent's directory in `directory`, for anybody to read. Byte-compiled, which matters to those who
    run it from there: a bundle leaves that out, and nodes compile its packages once for a version."""
    agent = directory / "assistant"
    shutil.copytree(AGENT, agent)
    shutil.copytree(_framework(), agent / VENDORED)
    subprocess.run([sys.executable, "-m", "compileall", "-q", str(agent)], check=True)
    subprocess.run(["chmod", "-R", "a+rX", str(agent)], check=True)
    return agent


def _framework() -> Path:
    """Installed once for each of its versions and Pythons."""
    name = hashlib.sha256(f"{_FRAMEWORK} {sys.version}".encode()).hexdigest()[:12]
    place = _CACHE / f"framework-{name}"
    if not place.exists():
        half_made = _CACHE / f"{place.name}-new"
        shutil.rmtree(half_made, ignore_errors=True)
        pip = [sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
        subprocess.run([*pip, "--target", str(half_made), _FRAMEWORK], check=True)
        half_made.rename(place)
    return place
