"""Which Python packages an agent brings, and which of them fit where.

In an agent's files, `wheels/cp311-x86_64/` holds those for one kind of node, as `roost deploy` finds them for
a requirements.txt; `wheels/` itself those that its developer put there, of which each node takes what fits.
Names of wheels and what they mean: PEP 425, 427, 440, 600.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from shared.errors import Reason, RoostError

REQUIREMENTS = "requirements.txt"
WHEELS, VENDORED, VENV = "wheels", "site-packages", "venv"  # directories of an agent

_TEXT = re.compile(r"cp(\d)(\d{1,3})-([a-z0-9_]{1,32})-(?:glibc(\d{1,3})\.(\d{1,3})|other)")
_MANYLINUX = re.compile(r"manylinux_(\d+)_(\d+)_(\w+)")
_LEGACY = {"manylinux1_": "2_5_", "manylinux2010_": "2_12_", "manylinux2014_": "2_17_"}
_MAX_TOLD = 5  # packages that an error names


@dataclass(frozen=True, slots=True)
class Platform:
    """What a node's agents run on. `glibc` (0, 0): another C library."""

    python: tuple[int, int]
    machine: str  # as `uname -m` has it
    glibc: tuple[int, int]

    @classmethod
    def here(cls) -> Platform:
        try:
            major, minor = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()[1].split(".")[:2]
            glibc = int(major), int(minor)
        except (ValueError, IndexError):
            glibc = 0, 0
        return cls(sys.version_info[:2], os.uname().machine, glibc)

    @classmethod
    def parse(cls, text: str) -> Platform:
        """ValueError."""
        found = _TEXT.fullmatch(text)
        if found is None:
            raise ValueError(f"{text[:80]!r} is no platform, like cp311-x86_64-glibc2.36")
        major, minor, machine, *glibc = found.groups()
        return cls((int(major), int(minor)), machine, (int(glibc[0] or 0), int(glibc[1] or 0)))

    def __str__(self) -> str:
        libc = "glibc{}.{}".format(*self.glibc) if self.glibc != (0, 0) else "other"
        return f"{self.directory}-{libc}"

    @property
    def directory(self) -> str:
        """Of `wheels/`, for all nodes with this interpreter and machine."""
        return "cp{}{}-{}".format(*self.python, self.machine)


@dataclass(frozen=True, slots=True)
class Wheel:
    """The name of a wheel's file, taken apart. `name` is in its one spelling."""

    file: str
    name: str
    version: str
    pythons: tuple[str, ...]
    abis: tuple[str, ...]
    platforms: tuple[str, ...]

    @classmethod
    def parse(cls, file: str) -> Wheel:
        """ValueError."""
        parts = file.removesuffix(".whl").split("-")
        if not file.endswith(".whl") or len(parts) not in (5, 6) or not all(parts):
            raise ValueError(f"{file[:120]!r} is not the name of a wheel")
        name, version, *_, python, abi, platform = parts
        return cls(
            file,
            normal_name(name),
            version,
            tuple(python.split(".")),
            tuple(abi.split(".")),
            tuple(platform.split(".")),
        )

    def fits(self, where: Platform) -> bool:
        return any(_fits_platform(p, where) for p in self.platforms) and any(
            _fits_python(python, abi, where.python) for python in self.pythons for abi in self.abis
        )

    @property
    def is_pure(self) -> bool:
        return self.platforms == ("any",)


def normal_name(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _fits_python(python: str, abi: str, here: tuple[int, int]) -> bool:
    major, minor = here
    found = re.fullmatch(r"(py|cp)(\d)(\d*)", python)
    if found is None or int(found[2]) != major:
        return False
    kind, wanted = found[1], int(found[3] or 0)
    if kind == "py":
        return abi == "none" and wanted <= minor
    return (abi in ("none", f"cp{major}{minor}") and wanted == minor) or (abi == "abi3" and wanted <= minor)


def _fits_platform(platform: str, here: Platform) -> bool:
    if platform in ("any", f"linux_{here.machine}"):
        return True
    for legacy, since in _LEGACY.items():
        platform = platform.replace(legacy, f"manylinux_{since}")
    found = _MANYLINUX.fullmatch(platform)
    if found is None or found[3] != here.machine:
        return False
    return (int(found[1]), int(found[2])) <= here.glibc


def choose(files: Mapping[str, Sequence[str]], here: Platform) -> list[str]:
    """The wheels to unpack here, as paths below `wheels/`; none if it holds none at all. `files`: names by
    directory of `wheels/`, with "" for itself. AGENT_PREPARE_FAILED if something that this node
    needs is not among them."""
    files = {d: [f for f in names if f.endswith(".whl")] for d, names in files.items()}
    if not any(files.values()):
        return []
    directory = here.directory if here.directory in files else ""
    if not files.get(directory):
        others = ", ".join(sorted(d for d in files if d))
        raise prepare_failed(
            f"the agent brings packages for {others}, and this node is {here.directory}",
            "deploy it again while this node is up, or put wheels that fit it into wheels/",
        )
    try:
        wheels = [Wheel.parse(file) for file in files[directory]]
    except ValueError as error:
        raise prepare_failed(f"wheels/{directory}: {error}", "only wheels belong there") from error
    chosen = [_best(name, of_name, here) for name, of_name in sorted(_by_name(wheels).items())]
    absent = [wheels for wheels in chosen if not isinstance(wheels, Wheel)]
    if absent:
        told = ", ".join(wheels[0].file for wheels in absent[:_MAX_TOLD])
        more = f" and {len(absent) - _MAX_TOLD} more" if len(absent) > _MAX_TOLD else ""
        raise prepare_failed(
            f"these packages have no wheel that fits {here}: {told}{more}",
            f"add wheels for it to wheels/, or name them in {REQUIREMENTS} and let `roost deploy` find them",
        )
    prefix = f"{directory}/" if directory else ""
    return [prefix + wheel.file for wheel in chosen if isinstance(wheel, Wheel)]


def _by_name(wheels: Iterable[Wheel]) -> dict[str, list[Wheel]]:
    found: dict[str, list[Wheel]] = {}
    for wheel in wheels:
        found.setdefault(wheel.name, []).append(wheel)
    return found


def _best(name: str, wheels: list[Wheel], here: Platform) -> Wheel | list[Wheel]:
    """The one that fits, compiled before pure; all of them if none does."""
    fitting = [wheel for wheel in wheels if wheel.fits(here)]
    versions = sorted({wheel.version for wheel in fitting})
    if len(versions) > 1:
        raise prepare_failed(
            f"wheels/ holds {name} in several versions: {', '.join(versions)}", "keep one of them"
        )
    return min(fitting, key=lambda wheel: (wheel.is_pure, wheel.file)) if fitting else wheels


def prepare_failed(message: str, hint: str = "") -> RoostError:
    return RoostError(Reason.AGENT_PREPARE_FAILED, message, hint)
