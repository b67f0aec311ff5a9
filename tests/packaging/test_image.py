"""The coordinator's image: built as `make image` builds it, and started against a real etcd.

It keeps its images and containers in a storage of its own, below .cache, so that it can neither see nor
harm those of the machine. A run that was killed leaves that storage behind, and the next run clears it
before it begins.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from coordinator.config import CoordinatorConfig
from shared.config import load
from tests.packaging.examples import missing_keys, uncommented
from tests.support.etcd import running_etcd
from tests.support.eventually import eventually

ROOT = Path(__file__).parents[2]
STORAGE = ROOT / ".cache" / "containers"
BUILD_SECONDS = 220.0
COORDINATOR_UID = 10001
# Should this test be killed, its container ends by itself after this time.
CONTAINER_SECONDS = 90

# Given here because podman's own defaults exceed what some machines allow even to root.
LIMITS = ("--ulimit=nofile=20000:20000", "--ulimit=nproc=4096:4096")
TOOLS = ("buildah", "podman", "runc", "mmdebstrap")

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="a chroot build needs root"),
    pytest.mark.timeout(BUILD_SECONDS + CONTAINER_SECONDS),
]


def podman(*arguments: str | Path, timeout: float = 60.0, check: bool = True, errors: bool = False) -> str:
    """Runs podman on this test's own storage, without systemd; gives its standard output, or all it says."""
    own = ("--root", STORAGE / "root", "--runroot", STORAGE / "run")
    done = subprocess.run(
        ["podman", *own, "--runtime", "runc", "--cgroup-manager=cgroupfs", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert not check or done.returncode == 0, done.stderr + done.stdout
    return (done.stdout + done.stderr if errors else done.stdout).strip()


def logs(container: str) -> str:
    return podman("logs", container, check=False, errors=True)


def clear_storage() -> None:
    """Ends this storage's containers and removes all of it."""
    if not STORAGE.exists():
        return
    for container in podman("ps", "--all", "--quiet", "--no-trunc", check=False).split():
        podman("rm", "--force", "--time", "0", container, check=False)
    for image in podman("images", "--all", "--quiet", "--no-trunc", check=False).split():
        podman("rmi", "--force", image, check=False)
    subprocess.run(["umount", "--quiet", STORAGE / "root" / "overlay"], check=False)
    shutil.rmtree(STORAGE)


@pytest.fixture(scope="module")
def image() -> Iterator[str]:
    """The id of the image. The tools come with `make test`: that one is missing is a failure, not a skip."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    assert not missing, f"{', '.join(missing)} missing: run packaging/bootstrap.sh --test"
    clear_storage()
    try:
        done = subprocess.run(
            # Ends all that the build started when its time is over, even if this test is no more.
            ["timeout", str(BUILD_SECONDS), ROOT / "packaging/coordinator/build.sh", "--storage", STORAGE],
            capture_output=True,
            text=True,
            timeout=BUILD_SECONDS + 10.0,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, done.stderr
        yield done.stdout.splitlines()[-1]
    finally:
        clear_storage()


def config(directory: Path, etcd: str) -> Path:
    """A coordinator's configuration; the directory is the container's /var/lib/roost."""
    os.chown(directory, COORDINATOR_UID, COORDINATOR_UID)
    path = directory / "coordinator.toml"
    path.write_text(
        f"""
        id = "boxed"
        listen = "127.0.0.1:0"
        etcd = ["{etcd}"]
        blobs = "file:///var/lib/roost/blobs"
        ready_file = "/var/lib/roost/ready"
        """
    )
    return path


def start(image: str, directory: Path, config: Path) -> str:
    """Starts the container; gives its id."""
    return podman(
        "run",
        "--detach",
        f"--timeout={CONTAINER_SECONDS}",
        "--network=host",
        "--log-driver=k8s-file",
        *LIMITS,
        f"--volume={directory}:/var/lib/roost",
        f"--volume={config}:/etc/roost/coordinator.toml:ro",
        image,
    )


async def address_once_ready(container: str, ready: Path) -> str:
    """Where the coordinator listens, once it says that it serves. One that ended fails with its log."""

    def address() -> str:
        state = podman("inspect", "--format={{.State.Status}} {{.State.ExitCode}}", container)
        if state.split()[0] not in ("created", "running"):
            raise AssertionError(f"the container is {state}: {logs(container)}")
        return ready.read_text().strip() if ready.exists() else ""

    try:
        return str(await eventually(address, 20.0, "the ready file"))
    except AssertionError as error:
        error.add_note(logs(container))
        raise


def serves(address: str) -> bool:
    with grpc.insecure_channel(address) as channel:
        reply = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5.0)
    return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


async def test_the_image_serves_with_a_real_etcd_and_stops_cleanly(image: str, tmp_path: Path) -> None:
    state, store = tmp_path / "state", tmp_path / "etcd"
    state.mkdir()
    store.mkdir()
    async with running_etcd(store) as etcd:
        container = start(image, state, config(state, etcd.endpoint))
        try:
            address = await address_once_ready(container, state / "ready")
            assert serves(address)
            podman("healthcheck", "run", container)
            assert podman("exec", container, "id", "--user") == str(COORDINATOR_UID)
            podman("stop", "--time", "15", container)
            assert podman("inspect", "--format={{.State.ExitCode}}", container) == "0", logs(container)
        finally:
            podman("rm", "--force", "--time", "0", container)


async def test_the_health_check_tells_when_etcd_is_gone(image: str, tmp_path: Path) -> None:
    state, store = tmp_path / "state", tmp_path / "etcd"
    state.mkdir()
    store.mkdir()
    async with running_etcd(store) as etcd:
        container = start(image, state, config(state, etcd.endpoint))
        try:
            await address_once_ready(container, state / "ready")
            await etcd.stop()
            check = ("exec", container, "python", "/opt/roost/health.py", "/etc/roost/coordinator.toml")
            await eventually(
                lambda: "NOT_SERVING" in podman(*check, check=False, errors=True), 20.0, "NOT_SERVING"
            )
        finally:
            podman("rm", "--force", "--time", "0", container)


def test_the_example_shows_every_key_and_the_true_defaults() -> None:
    example = (ROOT / "packaging/coordinator/coordinator.toml.example").read_text()
    plain = load(CoordinatorConfig, example, "coordinator.toml.example")
    shown = load(CoordinatorConfig, uncommented(example), "coordinator.toml.example")
    assert dataclasses.replace(shown, ready_file=None) == plain
    assert missing_keys(example, shown) == []


def test_the_image_carries_nothing_to_install_with(image: str) -> None:
    inspected = json.loads(podman("inspect", image))[0]
    assert inspected["User"] == "roost"
    assert inspected["Config"]["Entrypoint"] == ["roost-coordinator"]
    script = "import importlib.util as u; print([n for n in ('pip', 'setuptools') if u.find_spec(n)])"
    command = ("run", "--rm", "--network=none", *LIMITS, "--entrypoint=python", image, "-c", script)
    assert podman(*command) == "[]"
