"""`roost deploy DIR`: checks an agent's directory here, uploads what the mesh does not have, deploys it."""

from __future__ import annotations

import argparse
import asyncio
import json
import stat
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import grpc.aio
from rich.console import Console

from protos.v1 import admin_pb2, admin_pb2_grpc, blobs_pb2, blobs_pb2_grpc, common_pb2
from roost._mesh import Coordinators
from roost.cli._common import ADMIN_TIMEOUT, Commands, add_command, add_json, coordinators_of, tenant_of
from roost.cli._wheels import gather, has_requirements
from shared.bundle import Bundle, pack
from shared.content import Blob
from shared.errors import Reason, RoostError
from shared.policy import FILE_NAME, Policy, parse_policy
from shared.units import format_size
from shared.wheels import Platform

_UPLOAD_TIMEOUT = 300.0  # seconds within which a coordinator must have been found
_PUT_AT_ONCE = 32  # blobs, of 64 KiB on average
_PUT_TIMEOUT = 120.0  # seconds for those
_TRIES = 3  # of an upload that rounds of collecting overtake
_ASK_AT_ONCE = 5_000  # hashes in one question, far below the size limit of a message


def add(commands: Commands, common: argparse.ArgumentParser) -> None:
    parser = add_command(commands, common, "deploy", "deploy the agent in a directory", run)
    parser.add_argument("dir", metavar="DIR", type=Path, help=f"holds {FILE_NAME} and the agent's files")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    with Console(stderr=True).status("checking") as status:  # silent where nobody looks
        done = asyncio.run(deploy(coordinators_of(args), tenant_of(args), args.dir, status.update))
    name, version, size = done.name, done.reply.version, format_size(done.size)
    if args.json:
        told = {"name": name, "version": version, "bytes": done.size, "changed": done.reply.changed}
        print(json.dumps(told))
    elif done.reply.changed:
        print(f"{name} {version[:12]} is deployed ({size}B).")
    else:
        print(f"{name} {version[:12]} was deployed already ({size}B).")
    return 0


@dataclass(frozen=True, slots=True)
class Deployed:
    name: str
    reply: admin_pb2.DeployReply
    size: int  # bytes


async def deploy(
    addresses: Sequence[str], tenant: str, directory: Path, tell: Callable[[str], None]
) -> Deployed:
    """Packs the agent in `directory`, with the packages that it names for the nodes that there are."""
    text, policy = check(directory)
    coordinators = Coordinators(addresses)
    try:
        wheels: dict[str, Path] = {}
        if has_requirements(directory):
            platforms = await _platforms(coordinators)
            wheels = await asyncio.to_thread(gather, directory, platforms, tell)
        bundle = pack(directory, wheels)
        spec = common_pb2.AgentSpec(
            tenant=tenant, name=policy.agent.name, policy_toml=text, bundle_root=bundle.root
        )
        reply = await _deploy(coordinators, spec, bundle, tell)
    finally:
        await coordinators.close()
    return Deployed(policy.agent.name, reply, bundle.size)


async def _platforms(coordinators: Coordinators) -> set[Platform]:
    """Of all nodes; this machine's if there are none yet."""

    async def status(channel: grpc.aio.Channel, timeout: float) -> admin_pb2.StatusReply:
        return await admin_pb2_grpc.AdminStub(channel).Status(admin_pb2.StatusRequest(), timeout=timeout)

    found: set[Platform] = set()
    for node in (await coordinators.ask(status, ADMIN_TIMEOUT)).nodes:
        with suppress(ValueError):  # an older node's, or one that is lost
            found.add(Platform.parse(node.node.platform))
    return found or {Platform.here()}


def check(directory: Path) -> tuple[str, Policy]:
    """The text of the directory's agent.toml and what it says. AGENT_INVALID names what is wrong."""
    path = directory / FILE_NAME
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise RoostError(
            Reason.AGENT_INVALID,
            f"{path} can't be read: {why}",
            f"an agent is a directory with an {FILE_NAME}; docs/first-agent.md shows one",
        ) from error
    policy = parse_policy(text, str(path))
    if policy.run.entry:
        _check_entry(directory, policy.run.entry)
    else:
        _check_program(directory, policy.run.command[0])
    return text, policy


def _check_entry(directory: Path, entry: str) -> None:
    module, _, name = entry.partition(":")
    base = directory.joinpath(*module.split("."))
    if not base.with_suffix(".py").is_file() and not (base / "__init__.py").is_file():
        file = base.with_suffix(".py").relative_to(directory)
        raise RoostError(
            Reason.AGENT_INVALID,
            f"{directory / FILE_NAME}: entry {entry!r} names the module {module}, but {directory} holds no "
            f"{file}",
            f'write {file} with `{name} = Agent()`, or correct entry = "module:object" in {FILE_NAME}',
        )


def _check_program(directory: Path, program: str) -> None:
    """Of one that the agent brings along; what a node has, only the node knows."""
    if "/" not in program or program.startswith("/"):
        return
    path = directory / program
    if not path.is_file() or not path.stat().st_mode & stat.S_IXUSR:
        what = "is not executable" if path.is_file() else "is not there"
        raise RoostError(
            Reason.AGENT_INVALID,
            f"{directory / FILE_NAME}: command names {program}, which {what}",
            f"chmod +x {path}" if path.is_file() else "name a file of the agent's directory",
        )


async def _deploy(
    coordinators: Coordinators, spec: common_pb2.AgentSpec, bundle: Bundle, tell: Callable[[str], None]
) -> admin_pb2.DeployReply:
    async def upload(channel: grpc.aio.Channel, timeout: float) -> int:
        return await _upload(blobs_pb2_grpc.BlobsStub(channel), bundle.blobs, tell)

    async def deploy(channel: grpc.aio.Channel, timeout: float) -> admin_pb2.DeployReply:
        request = admin_pb2.DeployRequest(agent=spec, gc_round=gc_round)
        return await admin_pb2_grpc.AdminStub(channel).Deploy(request, timeout=timeout)

    for _ in range(_TRIES):
        gc_round = await coordinators.ask(upload, _UPLOAD_TIMEOUT)
        try:
            return await coordinators.ask(deploy, ADMIN_TIMEOUT)
        except RoostError as error:
            if error.reason is not Reason.UPLOAD_STALE:
                raise
            stale = error
    raise stale


async def _upload(
    blobs: blobs_pb2_grpc.BlobsAsyncStub, have: Mapping[str, bytes], tell: Callable[[str], None]
) -> int:
    """In calls of a few blobs each, so that a slow line needs no long deadline, nor many of them memory. The
    round of collecting in which it began."""
    tell("comparing with what the mesh has")
    hashes = sorted(have)
    missing: list[str] = []
    rounds: list[int] = []
    for start in range(0, len(hashes), _ASK_AT_ONCE):
        request = blobs_pb2.MissingRequest(hashes=hashes[start : start + _ASK_AT_ONCE])
        reply = await blobs.Missing(request, timeout=ADMIN_TIMEOUT)
        missing += reply.hashes
        rounds.append(reply.gc_round)

    async def each(some: Sequence[blobs_pb2.Blob]) -> AsyncIterator[blobs_pb2.Blob]:
        for blob in some:
            yield blob

    for start in range(0, len(missing), _PUT_AT_ONCE):
        tell(f"uploading: {100 * start // len(missing)} %")
        group = missing[start : start + _PUT_AT_ONCE]
        some = [blobs_pb2.Blob(hash=hash, zstd=Blob.of(have[hash]).zstd) for hash in group]
        await blobs.Put(each(some), timeout=_PUT_TIMEOUT)
    return min(rounds)
