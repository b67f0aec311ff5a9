"""`roost deploy DIR`: checks an agent's directory here, uploads what the mesh does not have, deploys it."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

import grpc.aio

from protos.v1 import admin_pb2, admin_pb2_grpc, blobs_pb2, blobs_pb2_grpc, common_pb2
from roost._mesh import Coordinators
from roost.cli._common import ADMIN_TIMEOUT, Commands, add_command, add_json, coordinators_of, tenant_of
from shared.bundle import Bundle, pack
from shared.content import Blob
from shared.errors import Reason, RoostError
from shared.policy import FILE_NAME, Policy, parse_policy
from shared.units import format_size

_UPLOAD_TIMEOUT = 300.0  # seconds for all of a bundle's blobs
_ASK_AT_ONCE = 5_000  # hashes in one question, far below the size limit of a message


def add(commands: Commands, common: argparse.ArgumentParser) -> None:
    parser = add_command(commands, common, "deploy", "deploy the agent in a directory", run)
    parser.add_argument("dir", metavar="DIR", type=Path, help=f"holds {FILE_NAME} and the agent's files")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    text, policy = check(args.dir)
    bundle = pack(args.dir)
    spec = common_pb2.AgentSpec(
        tenant=tenant_of(args), name=policy.agent.name, policy_toml=text, bundle_root=bundle.root
    )
    reply = asyncio.run(_deploy(coordinators_of(args), spec, bundle))
    size = sum(map(len, bundle.blobs.values()))
    if args.json:
        told = {"name": spec.name, "version": reply.version, "bytes": size, "changed": reply.changed}
        print(json.dumps(told))
    elif reply.changed:
        print(f"{spec.name} {reply.version[:12]} is deployed ({format_size(size)}B).")
    else:
        print(f"{spec.name} {reply.version[:12]} was deployed already ({format_size(size)}B).")
    return 0


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
    module, _, name = policy.run.entry.partition(":")
    base = directory.joinpath(*module.split("."))
    if not base.with_suffix(".py").is_file() and not (base / "__init__.py").is_file():
        file = base.with_suffix(".py").relative_to(directory)
        raise RoostError(
            Reason.AGENT_INVALID,
            f"{path}: entry {policy.run.entry!r} names the module {module}, but {directory} holds no {file}",
            f'write {file} with `{name} = Agent()`, or correct entry = "module:object" in {FILE_NAME}',
        )
    return text, policy


async def _deploy(
    addresses: Sequence[str], spec: common_pb2.AgentSpec, bundle: Bundle
) -> admin_pb2.DeployReply:
    async def upload(channel: grpc.aio.Channel, timeout: float) -> None:
        await _upload(blobs_pb2_grpc.BlobsStub(channel), bundle.blobs)

    async def deploy(channel: grpc.aio.Channel, timeout: float) -> admin_pb2.DeployReply:
        request = admin_pb2.DeployRequest(agent=spec)
        return await admin_pb2_grpc.AdminStub(channel).Deploy(request, timeout=timeout)

    coordinators = Coordinators(addresses)
    try:
        await coordinators.ask(upload, _UPLOAD_TIMEOUT)
        return await coordinators.ask(deploy, ADMIN_TIMEOUT)
    finally:
        await coordinators.close()


async def _upload(blobs: blobs_pb2_grpc.BlobsAsyncStub, have: Mapping[str, bytes]) -> None:
    hashes = sorted(have)
    missing: list[str] = []
    for start in range(0, len(hashes), _ASK_AT_ONCE):
        request = blobs_pb2.MissingRequest(hashes=hashes[start : start + _ASK_AT_ONCE])
        missing += (await blobs.Missing(request, timeout=ADMIN_TIMEOUT)).hashes

    async def each() -> AsyncIterator[blobs_pb2.Blob]:
        for hash in missing:
            yield blobs_pb2.Blob(hash=hash, zstd=Blob.of(have[hash]).zstd)

    if missing:
        await blobs.Put(each(), timeout=_UPLOAD_TIMEOUT)
