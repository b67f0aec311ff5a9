"""The escape matrix side by side: the very same probe in jails of Roost's that were started in each of the
three ways (exec, zygote, parked), and in `bwrap`, `runc` and `sandlock` with the options that their manuals
recommend for code that is not trusted. A sandbox that is not installed, or can't run here, is left out and
said so.

"OPEN" says that what was tried worked. Not each is an escape: some, like ptrace within one sandbox, are no
more than a part of the kernel that hostile code may go on to attack.

Figures: NAME.held, how many hazards each held of `hazards`, all; roost.held is the least of the three ways'.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.escape import NOBODY, PROBE, Report, canaries, probe_in_jails
from tests.support.starting import WAYS

_PYTHON = "/usr/bin/python3"
_SECONDS = 300.0
_MEMORY, _PROCESSES, _FILES = 128 << 20, 32, 1024
SECCOMP = Path("/usr/share/containers/seccomp.json")
_LINKS = ("bin", "sbin", "lib", "lib64")
Environment = dict[str, str]


class Unavailable(Exception):
    """A sandbox that can't be compared here, and why."""


@dataclass(frozen=True)
class Places:
    """`agent` holds the probe, `state` is for it to write to, `outside` is the host's."""

    agent: Path
    state: Path
    outside: Path


@contextmanager
def _places() -> Iterator[Places]:
    directory = Path(tempfile.mkdtemp(prefix="roost-escape-"))
    directory.chmod(0o755)
    try:
        places = Places(*(directory / name for name in ("agent", "state", "outside")))
        for place in (places.agent, places.state, places.outside):
            place.mkdir()
        shutil.copytree(PROBE, places.agent / "probe", ignore=shutil.ignore_patterns("__pycache__"))
        places.state.chmod(0o777)
        yield places
    finally:
        shutil.rmtree(directory)


def _run(argv: list[str], user: int | None, **options: Any) -> Report:
    try:
        done = subprocess.run(
            argv,
            user=user,
            group=user,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
            **options,
        )
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        raise Unavailable(str(error)) from error
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            report: Report = json.loads(line)
            return report
    raise Unavailable((done.stderr or done.stdout).strip()[-300:] or f"exit code {done.returncode}")


def bwrap(places: Places, environment: Environment) -> Report:
    """As its manual and flatpak do it, unprivileged; it limits no resources, and a filter would be ours."""
    options = ["--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent", "--new-session"]
    options += [
        "--clearenv",
        "--cap-drop",
        "ALL",
        "--ro-bind",
        "/usr",
        "/usr",
        "--proc",
        "/proc",
        "--dev",
        "/dev",
    ]
    for name in _LINKS:
        options += ["--symlink", f"usr/{name}", f"/{name}"]
    options += ["--tmpfs", "/tmp", "--ro-bind", str(places.agent), "/agent"]
    options += ["--bind", str(places.state), "/state", "--chdir", "/agent"]
    for name, value in environment.items():
        options += ["--setenv", name, value]
    return _run(["bwrap", *options, _PYTHON, "-B", "-m", "probe"], NOBODY, extra_groups=[])


def runc(places: Places, environment: Environment) -> Report:
    """As podman sets it up with --cap-drop=ALL --security-opt=no-new-privileges --read-only --user --memory
    --pids-limit --network=none, with its default filter (docker's is stricter on user namespaces)."""
    bundle = places.outside / "bundle"
    (bundle / "rootfs").mkdir(parents=True)
    try:
        subprocess.run(["runc", "spec"], cwd=bundle, check=True, capture_output=True)
    except FileNotFoundError as error:
        raise Unavailable("runc is not installed") from error
    if not SECCOMP.exists():
        raise Unavailable(f"{SECCOMP}, the usual filter, is missing")
    file = bundle / "config.json"
    file.write_text(json.dumps(_container(json.loads(file.read_text()), places, environment)))
    for name in _LINKS:
        (bundle / "rootfs" / name).symlink_to(f"usr/{name}")
    return _run(["runc", "run", f"roost-escape-{os.getpid()}"], None, cwd=bundle, stdin=subprocess.DEVNULL)


def _container(spec: dict[str, Any], places: Places, environment: Environment) -> dict[str, Any]:
    process, linux = spec["process"], spec["linux"]
    process["terminal"] = False
    process["user"] = {"uid": 1000, "gid": 1000}
    process["args"] = [_PYTHON, "-B", "-m", "probe"]
    process["cwd"] = "/agent"
    process["env"] = [f"{name}={value}" for name, value in environment.items()]
    process["capabilities"] = {}
    process["rlimits"] = [{"type": "RLIMIT_NOFILE", "hard": _FILES, "soft": _FILES}]
    read_only, writable = ["rbind", "ro", "nosuid"], ["rbind", "rw", "nosuid", "nodev"]
    tmp = {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"}
    spec["mounts"] += [
        {"destination": "/usr", "type": "bind", "source": "/usr", "options": read_only},
        {"destination": "/agent", "type": "bind", "source": str(places.agent), "options": read_only},
        {"destination": "/state", "type": "bind", "source": str(places.state), "options": writable},
        {**tmp, "options": ["nosuid", "nodev", f"size={_MEMORY // 2}"]},
    ]
    linux["resources"]["memory"] = {"limit": _MEMORY}
    linux["resources"]["pids"] = {"limit": _PROCESSES}
    linux["seccomp"] = docker_filter()
    return spec


def docker_filter() -> dict[str, Any]:
    """The profile that podman installs, for a container without capabilities on this architecture."""
    profile = json.loads(SECCOMP.read_text())
    machine = {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine]
    rules = []
    for rule in profile["syscalls"]:
        includes, excludes = rule.get("includes") or {}, rule.get("excludes") or {}
        here = machine in includes.get("arches", [machine]) and machine not in excludes.get("arches", [])
        if here and not includes.get("caps"):
            kept = {key: rule[key] for key in ("names", "action", "errnoRet") if rule.get(key) is not None}
            rules.append({**kept, **({"args": rule["args"]} if rule.get("args") else {})})
    arches = next(
        [entry["architecture"], *entry["subArchitectures"]]
        for entry in profile["archMap"]
        if entry["architecture"] == f"SCMP_ARCH_{os.uname().machine.upper()}"
    )
    return {
        "defaultAction": profile["defaultAction"],
        "defaultErrnoRet": profile["defaultErrnoRet"],
        "architectures": arches,
        "syscalls": rules,
    }


_SANDLOCK = """
import json, os, sys
sys.path[:0] = json.loads(sys.argv[2])
from sandlock import Sandbox
places = json.loads(sys.argv[1])
sandbox = Sandbox(
    fs_readable=["/usr", "/lib", "/lib64", "/bin", "/etc", "/proc", "/dev", places["agent"]],
    fs_writable=[places["state"]], clean_env=True, env=places["environment"], cwd=places["agent"],
    max_memory="128M", max_processes=32, max_open_files=1024, no_coredump=False,
)
result = sandbox.run(["/usr/bin/python3", "-B", "-m", "probe"], timeout=200)
out, err = (x.decode() if isinstance(x, bytes) else str(x) for x in (result.stdout, result.stderr))
print(out); print(err, result, file=sys.stderr)
"""


def sandlock(places: Places, environment: Environment) -> Report:
    """As its README does it, unprivileged: named directories, no network, limits."""
    find = "import sandlock, os; print(os.path.dirname(os.path.dirname(sandlock.__file__)))"
    where = subprocess.run([sys.executable, "-c", find], capture_output=True, text=True, check=False)
    if where.returncode:
        raise Unavailable("sandlock is not installed (pip install sandlock)")
    package = places.outside / "python"  # where nobody can read it
    package.mkdir()
    shutil.copytree(Path(where.stdout.strip()) / "sandlock", package / "sandlock")
    given = {
        "agent": str(places.agent),
        "state": str(places.state),
        "environment": {**environment, "PROBE_STATE": str(places.state), "TMPDIR": str(places.state)},
    }
    argv = [_PYTHON, "-B", "-c", _SANDLOCK, json.dumps(given), json.dumps([str(package)])]
    return _run(argv, NOBODY, extra_groups=[])


Sandbox = Callable[[Places, Environment], Report]
PEERS: dict[str, Sandbox] = {"bwrap": bwrap, "runc": runc, "sandlock": sandlock}


def compare() -> tuple[dict[str, Report], dict[str, str]]:
    """What the probe says in each, and why others were left out."""
    reports: dict[str, Report] = {}
    missing: dict[str, str] = {}
    with _places() as places, canaries(places.outside) as environment:
        reports.update(asyncio.run(probe_in_jails(environment)))
    for name, run in PEERS.items():
        with _places() as places, canaries(places.outside) as environment:
            try:
                reports[name] = run(places, environment)
            except Unavailable as error:
                missing[name] = str(error)
    return reports, missing


def main(data: Path) -> dict[str, float]:
    reports, missing = compare()
    hazards = list(reports[WAYS[0]])
    print(f"{'hazard':<52}" + "".join(f"{name:<26}" for name in reports))
    for hazard in hazards:
        cells = ((held, what) for held, what in (report[hazard] for report in reports.values()))
        row = "".join(f"{'held' if held else 'OPEN'} {what}"[:24].ljust(26) for held, what in cells)
        print(f"{hazard:<52}{row}")
    held = {name: sum(h for h, _ in report.values()) for name, report in reports.items()}
    print(f"{f'held of {len(hazards)}':<52}" + "".join(f"{count:<26}" for count in held.values()))
    print(
        "OPEN: what was tried worked. Not each is an escape; each is more of the kernel, or host, to attack."
    )
    for name, why in missing.items():
        print(f"{name} is left out: {why}")
    held["roost"] = min(held[way] for way in WAYS)
    return {"hazards": len(hazards), **{f"{name}.held": count for name, count in held.items()}}
