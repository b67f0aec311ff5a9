"""`roost jail plan AGENT`: all that a node does to make a jail of it, in order, and who does it.

What a node does, only a node's program knows, and it is not imported here: `python -m edge_agent --plan` is
run beside this one, and carries nothing out. So what is shown is what this machine's version would do.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import grpc.aio

from protos.v1 import admin_pb2, admin_pb2_grpc, blobs_pb2, blobs_pb2_grpc
from roost.cli._common import Commands, add_command, add_json, ask, for_stdout, tenant_of
from roost.cli._wheels import has_requirements
from roost.cli.deploy import check
from roost.up.needs import look
from shared.content import Blob
from shared.errors import Reason, RoostError
from shared.manifest import decode_tree
from shared.policy import FILE_NAME
from shared.wheels import VENDORED, VENV, WHEELS

_SECONDS = 30.0
_WAYS = ("exec", "zygote", "task")
_NODES_CONFIG = Path("/etc/roost/edge.toml")


@dataclass(frozen=True, slots=True)
class _Wanted:
    """`packages`: does it bring any?"""

    policy: str
    version: str
    packages: bool


def add(commands: Commands, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser("jail", help="look at how jails are made")
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    plan = add_command(
        verbs, common, "plan", "show what is done to make a jail, in order, and who does it", run
    )
    plan.add_argument("agent", metavar="AGENT", help="one that is deployed, or a directory with one")
    plan.add_argument(
        "--way",
        choices=_WAYS,
        default="exec",
        help="how it is started: executed (the default), forked from a zygote, or a task that it runs",
    )
    plan.add_argument(
        "--config", type=Path, help=f"the edge.toml of the node (else {_NODES_CONFIG}, if that can be read)"
    )
    add_json(plan)


def run(args: argparse.Namespace) -> int:
    _check_machine()
    directory = Path(args.agent)
    is_directory = "/" in args.agent or (directory / FILE_NAME).exists()
    wanted = _of_directory(directory) if is_directory else _deployed(args)
    told = _plan(wanted, args.way, args.config)
    if args.json:
        print(json.dumps(told))
    else:
        print(for_stdout("\n".join(_lines(told))))
    return 0


def _check_machine() -> None:
    machine = look()
    if machine.platform != "linux":
        raise RoostError(
            Reason.BAD_REQUEST,
            f"jails are made of what Linux has; this is {machine.platform}",
            "run this on a node, or on any Linux machine with the edge part of roost",
        )
    if "edge" in machine.absent:
        raise RoostError(
            Reason.BAD_REQUEST,
            "the part of roost that makes jails is not installed here",
            "pip install 'roost[edge,cli]', or run this on a node",
        )


def _of_directory(directory: Path) -> _Wanted:
    text, _ = check(directory)
    brought = any((directory / name).is_dir() for name in (WHEELS, VENDORED, VENV))
    return _Wanted(text, "version", brought or has_requirements(directory))


def _deployed(args: argparse.Namespace) -> _Wanted:
    name, tenant = args.agent, tenant_of(args)

    async def find(channel: grpc.aio.Channel, timeout: float) -> _Wanted | None:
        request = admin_pb2.ListAgentsRequest(tenant=tenant)
        reply = await admin_pb2_grpc.AdminStub(channel).ListAgents(request, timeout=timeout)
        for agent in reply.agents:
            if agent.name == name:
                packages = await _brings_packages(channel, agent.bundle_root, timeout)
                return _Wanted(agent.policy_toml, agent.version, packages)
        return None

    found = ask(args, find)
    if found is None:
        raise RoostError(
            Reason.AGENT_UNKNOWN,
            f"no agent {name} of tenant {tenant} is deployed, and there is no {name}/{FILE_NAME} here",
            "`roost status` lists those that are deployed",
        )
    return found


async def _brings_packages(channel: grpc.aio.Channel, root: str, timeout: float) -> bool:
    blobs = blobs_pb2_grpc.BlobsStub(channel)

    async def fetch(hashes: Sequence[str]) -> dict[str, bytes]:
        call = blobs.Get(blobs_pb2.GetRequest(hashes=hashes), timeout=timeout)
        return {blob.hash: Blob.verified(blob.hash, blob.zstd).plain async for blob in call}

    nodes = await decode_tree(root, fetch)
    return any(node.path in (WHEELS, VENDORED, VENV) for node in nodes)


def _plan(wanted: _Wanted, way: str, config: Path | None) -> dict[str, Any]:
    argv = [sys.executable, "-m", "edge_agent", "--plan", "-", "--way", way, "--version", wanted.version]
    if wanted.packages:
        argv.append("--packages")
    if config is None and _can_be_read(_NODES_CONFIG):
        config = _NODES_CONFIG
    if config is not None:
        argv += ["--config", str(config)]
    done = subprocess.run(
        argv, input=wanted.policy, capture_output=True, text=True, timeout=_SECONDS, check=False
    )
    try:
        told: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        raise RoostError(Reason.INTERNAL, "the node's program printed no plan", done.stderr[-2000:]) from None
    if "error" in told:
        raise RoostError(Reason.BAD_REQUEST, told["error"]["message"], told["error"]["hint"])
    return told


def _can_be_read(path: Path) -> bool:
    try:
        path.open().close()
    except OSError:
        return False
    return True


def _lines(told: dict[str, Any]) -> list[str]:
    whose = (
        f"as {told['config']} says" if told["config"] else "as a node does that has no edge.toml of its own"
    )
    lines = [f"A jail of {told['agent']}, started by {told['way']}, {whose}:"]
    number = 0
    for jail, stages in groupby(told["stages"], key=lambda stage: stage["jail"]):
        lines += ["", f"the {jail}"]
        for stage in stages:
            lines.append(f"  {stage['who']}")
            for operation in stage["operations"]:
                number += 1
                lines.append(f"  {number:4}  {operation}")
    return lines
