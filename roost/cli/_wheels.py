"""Finds the packages that an agent's requirements.txt names, on the developer's machine, so that nodes need
no package index: an agent comes with all that it imports, also to a box behind a bad line.

What was found for a requirements.txt is kept, so that deploying the same agent again gives the same version.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from shared.errors import Reason, RoostError
from shared.wheels import REQUIREMENTS, WHEELS, Platform

_PIP_SECONDS = 900.0
_OLDEST_GLIBC = 5  # 2.5, of manylinux1
_LEGACY = ("manylinux2014", "manylinux2010", "manylinux1")

Tell = Callable[[str], None]


def has_requirements(directory: Path) -> bool:
    try:
        lines = (directory / REQUIREMENTS).read_text().splitlines()
    except FileNotFoundError:
        return False
    except (OSError, UnicodeDecodeError) as error:
        raise _failed(f"{directory / REQUIREMENTS} can't be read: {error}", "") from error
    return any(line.strip() and not line.strip().startswith("#") for line in lines)


def gather(directory: Path, platforms: Iterable[Platform], tell: Tell) -> dict[str, Path]:
    """Directories with wheels, by the name that they have below `wheels/`. AGENT_INVALID says, in pip's
    words, what can't be found. The agent's own `wheels/` is looked in first, and alone if it has all."""
    oldest: dict[str, Platform] = {}
    for platform in sorted(platforms, key=lambda p: p.glibc, reverse=True):
        oldest[platform.directory] = platform
    return {name: _for(directory, platform, tell) for name, platform in sorted(oldest.items())}


def _for(directory: Path, platform: Platform, tell: Tell) -> Path:
    kept = _cache() / _key(directory, platform)
    if kept.is_dir():
        return kept
    tell(f"finding packages for {platform}")
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent, prefix=".new-") as temporary:
        found, built = Path(temporary, "found"), Path(temporary, "built")
        found.mkdir()
        _find(directory, platform, found, built, tell)
        try:
            found.rename(kept)
        except OSError:
            if not kept.is_dir():  # else another deploy was faster
                raise
    return kept


def _find(directory: Path, platform: Platform, found: Path, built: Path, tell: Tell) -> None:
    own = ["--find-links", WHEELS] if (directory / WHEELS).is_dir() else []
    download = ["download", "--dest", str(found), *_only_for(platform), *own]
    if own and not _pip(directory, [*download, "--no-index"]):
        return
    why = _pip(directory, download)
    if why is None:
        return
    tell(f"building what has no wheel for {platform}")
    if _pip(directory, ["wheel", "--wheel-dir", str(built), *own]) is None:
        why = _pip(directory, [*download, "--find-links", str(built)])
    if why is not None:
        raise _failed(
            f"{directory / REQUIREMENTS}: not all packages can be had for {platform}: {why}",
            f"put wheels for it into {directory / WHEELS}, or name versions that have some",
        )


def _only_for(platform: Platform) -> list[str]:
    python = "{}{}".format(*platform.python)
    arguments = ["--only-binary=:all:", "--implementation=cp", f"--python-version={python}"]
    arguments += [f"--abi={abi}" for abi in (f"cp{python}", "abi3", "none")]
    major, minor = platform.glibc
    names = [f"manylinux_{major}_{n}" for n in range(minor, _OLDEST_GLIBC - 1, -1)]
    names += [*_LEGACY, "linux"] if names else ["linux"]
    return arguments + [f"--platform={name}_{platform.machine}" for name in names]


def _pip(directory: Path, arguments: list[str]) -> str | None:
    """None if it succeeded, else what it complained of last."""
    quiet = ["--quiet", "--no-input", "--disable-pip-version-check", "--requirement", REQUIREMENTS]
    argv = [sys.executable, "-m", "pip", arguments[0], *quiet, *arguments[1:]]
    try:
        done = subprocess.run(
            argv,
            cwd=directory,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=_PIP_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"pip did not end within {_PIP_SECONDS:g} s"
    if done.returncode == 0:
        return None
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines or [f"pip ended with {done.returncode}"])[-1].removeprefix("ERROR: ")


def _key(directory: Path, platform: Platform) -> str:
    digest = hashlib.sha256((directory / REQUIREMENTS).read_bytes())
    if (directory / WHEELS).is_dir():
        for path in sorted((directory / WHEELS).iterdir()):
            digest.update(f"\0{path.name}\0{path.stat().st_size}\0{path.stat().st_mtime_ns}".encode())
    return f"{platform}-{digest.hexdigest()[:32]}"


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "roost" / WHEELS


def _failed(message: str, hint: str) -> RoostError:
    return RoostError(Reason.AGENT_INVALID, message, hint)
