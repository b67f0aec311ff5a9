"""`roost state ...`: the versions of an instance's state, and the store that holds them."""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import grpc.aio

from protos.v1 import state_pb2, state_pb2_grpc
from roost import _archive
from roost._damage import Checked
from roost._mesh import Coordinators
from roost._versions import Version, Versions, readable
from roost.cli import _tables
from roost.cli._common import (
    Commands,
    add_command,
    add_json,
    ask,
    coordinators_of,
    printable,
    tenant_of,
    to_dict,
)
from roost.cli._tables import Cell, Grid
from shared.content import Blob
from shared.errors import Reason, RoostError
from shared.identity import InstanceKey
from shared.units import format_size

T = TypeVar("T")

_PUT_AT_ONCE = 32


def add(commands: Commands, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "state", help="look at, bring back, save and load instances' state", parents=[common]
    )
    parts = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _of_instance(parts, common, "log", "list the versions that are kept", log)
    restore = _of_instance(parts, common, "restore", "make an older version the present one", restore_version)
    restore.add_argument("version", metavar="VERSION", type=int, help="as `roost state log` lists it")
    export = _of_instance(parts, common, "export", "write a version's files into a tar archive", export_to)
    export.add_argument("file", metavar="FILE", type=Path)
    export.add_argument("--version", dest="number", metavar="N", type=int, help="else: the present one")
    load = _of_instance(
        parts, common, "import", "make a tar archive's files the present version", import_from
    )
    load.add_argument("file", metavar="FILE", type=Path)
    look = _of_instance(parts, common, "check", "read all that a version needs, and tell of damage", check)
    look.add_argument("--version", dest="number", metavar="N", type=int, help="else: the present one")
    heal = _of_instance(parts, common, "repair", "bring back what is damaged, from nodes' copies", repair)
    heal.add_argument("--version", dest="number", metavar="N", type=int, help="else: the present one")
    gc = add_command(parts, common, "gc", "collect what nobody needs in the blob store, now", collect)
    gc.add_argument("--dry-run", action="store_true", help="only look")
    add_json(gc)


def _of_instance(
    commands: Commands,
    common: argparse.ArgumentParser,
    name: str,
    summary: str,
    run: Callable[[argparse.Namespace], int],
) -> argparse.ArgumentParser:
    parser = add_command(commands, common, name, summary, run)
    parser.add_argument("agent", metavar="AGENT")
    parser.add_argument("--user", required=True, metavar="U", help="whose instance")
    add_json(parser)
    return parser


def log(args: argparse.Namespace) -> int:
    async def call(versions: Versions) -> list[Version]:
        head = await versions.head()
        if not head.epoch:
            raise RoostError(
                Reason.BAD_REQUEST,
                f"there is no instance of {args.agent} for {args.user}",
                "one comes to be with its first message, or by `roost state import`",
            )
        return await versions.log(head)

    kept = _with_versions(args, call)
    if args.json:
        print(json.dumps({"versions": [_told(version) for version in kept]}))
    else:
        headers = ("version", "epoch", "when", "turn", "size", "files", "node")
        rows = tuple(_row(version) for version in kept)
        _tables.show(Grid("versions", headers, rows, "nothing is committed yet"))
    return 0


def restore_version(args: argparse.Namespace) -> int:
    number, epoch = _with_versions(args, lambda versions: versions.restore(args.version))
    return _say(args, f"version {args.version} is the present one again, as version {number}", number, epoch)


def export_to(args: argparse.Namespace) -> int:
    key = _key(args)

    async def call(versions: Versions) -> tuple[int, int]:
        _, version = await versions.find(args.number)
        manifest = readable(key, version)
        await _archive.write(args.file, manifest.nodes, versions.chunks)
        return version.number, manifest.size

    number, size = _with_versions(args, call)
    if args.json:
        print(json.dumps({"version": number, "bytes": size}))
    else:
        print(f"Version {number} of {args.agent} for {args.user} is in {args.file} ({format_size(size)}B).")
    return 0


def import_from(args: argparse.Namespace) -> int:
    async def call(versions: Versions) -> tuple[int, int]:
        archive = await _archive.read(args.file, (await versions.head()).disk_bytes)

        async def put(missing: set[str]) -> None:
            wanted = sorted(missing)
            for start in range(0, len(wanted), _PUT_AT_ONCE):
                some = wanted[start : start + _PUT_AT_ONCE]
                await versions.chunks.put([Blob.of(archive.plain(hash)) for hash in some])

        return await versions.replace(archive.nodes, put, f"imported from {args.file.name}"[:200])

    number, epoch = _with_versions(args, call)
    return _say(args, f"{args.file} is the present state, as version {number}", number, epoch)


def check(args: argparse.Namespace) -> int:
    async def call(versions: Versions) -> tuple[Version, Checked]:
        _, version = await versions.find(args.number)
        return version, await versions.doctor.check(version.root)

    version, checked = _with_versions(args, call)
    return _tell_damage(args, version, checked, {}, f"{checked.blobs:,} blobs are as they were")


def repair(args: argparse.Namespace) -> int:
    async def call(versions: Versions) -> tuple[Version, int, Checked]:
        _, version = await versions.find(args.number)
        return version, *await versions.doctor.repair(version.root)

    version, repaired, checked = _with_versions(args, call)
    return _tell_damage(
        args, version, checked, {"repaired": repaired}, f"{repaired:,} blobs were brought back"
    )


def _tell_damage(
    args: argparse.Namespace, version: Version, checked: Checked, more: dict[str, int], good: str
) -> int:
    """The exit code is 1 if anything is damaged."""
    whose = f"version {version.number} of {args.agent} for {args.user}"
    if args.json:
        told = [{"hash": d.hash, "what": d.what, "of": list(d.of)} for d in checked.damage]
        print(json.dumps({"version": version.number, "blobs": checked.blobs, "damage": told} | more))
    elif not checked.damage:
        print(f"{whose} is whole: {good}.")
    else:
        for damage in checked.damage:
            print(printable(f"{damage.what}: {damage.hash[:12]}, of {', '.join(damage.of[:5])}"))
        print(f"{whose} is damaged: {len(checked.damage):,} of {checked.blobs:,} blobs.")
    return 1 if checked.damage else 0


def collect(args: argparse.Namespace) -> int:
    request = state_pb2.CollectRequest(dry_run=args.dry_run)

    async def call(channel: grpc.aio.Channel, timeout: float) -> state_pb2.Collection:
        """It may take hours; every few seconds the coordinator says that it is still at it."""
        return [told async for told in state_pb2_grpc.StateStub(channel).Collect(request)][-1]

    report = ask(args, call)
    if args.json:
        print(json.dumps(to_dict(report)))
        return 0
    would = "would be " if args.dry_run else ""
    print(f"{report.blobs:,} blobs, {format_size(report.bytes)}B; {report.needed:,} are needed.")
    size = format_size(report.condemned_bytes)
    print(f"{report.condemned:,} {would}set aside ({size}B), to be deleted two rounds from now.")
    print(f"{report.purged:,} {would}deleted ({format_size(report.purged_bytes)}B), set aside earlier.")
    if report.rescued:
        print(f"{report.rescued:,} brought back: they are needed after all.")
    if report.missing:
        some = ", ".join(hash[:12] for hash in report.missing_some)
        print(f"{report.missing:,} are needed and missing: {some}. `roost state check` says whose they are.")
    return 0


def _say(args: argparse.Namespace, what: str, number: int, epoch: int) -> int:
    if args.json:
        print(json.dumps({"version": number, "epoch": epoch}))
    else:
        print(f"{args.agent} for {args.user}: {what}, in epoch {epoch}.")
    return 0


def _with_versions(args: argparse.Namespace, call: Callable[[Versions], Awaitable[T]]) -> T:
    async def calling() -> T:
        coordinators = Coordinators(coordinators_of(args))
        try:
            return await call(Versions(coordinators, _key(args)))
        finally:
            await coordinators.close()

    return asyncio.run(calling())


def _key(args: argparse.Namespace) -> InstanceKey:
    return InstanceKey(tenant_of(args), args.agent, args.user)


def _told(version: Version) -> dict[str, Any]:
    told: dict[str, Any] = {"version": version.number, "root": version.root, "damage": version.damage}
    if (manifest := version.manifest) is None:
        return told | {"damage": version.damage or "its manifest is not in the blob store"}
    return told | {
        "epoch": manifest.epoch,
        "made_ms": manifest.made_ms,
        "turn": "" if manifest.note or not manifest.turns else manifest.turns[-1].id,
        "bytes": manifest.size,
        "files": len(manifest.nodes),
        "node": manifest.node,
        "note": manifest.note,
    }


def _row(version: Version) -> tuple[Cell, ...]:
    told = _told(version)
    if told["damage"]:
        return (Cell(str(version.number), "bold"), *map(Cell, ("–", "–", told["damage"], "–", "–", "–")))
    made = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(told["made_ms"] / 1000))
    return (
        Cell(str(version.number), "bold"),
        Cell(str(told["epoch"])),
        Cell(made if told["made_ms"] else "–"),
        Cell(told["turn"] or told["note"] or "–"),
        Cell(format_size(told["bytes"])),
        Cell(str(told["files"])),
        Cell(told["node"] or "–"),
    )
