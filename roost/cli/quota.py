"""`roost quota TENANT`: what a tenant may have in all, and has."""

from __future__ import annotations

import argparse
import json

import grpc.aio

from protos.v1 import state_pb2, state_pb2_grpc
from roost.cli._common import Commands, add_command, add_json, ask, printable, size_argument, to_dict
from shared.units import format_size


def add(commands: Commands, common: argparse.ArgumentParser) -> None:
    parser = add_command(commands, common, "quota", "show or set what a tenant may have in all", run)
    parser.add_argument("name", metavar="TENANT")
    parser.add_argument(
        "--bytes", type=size_argument, metavar="SIZE", help='of all state, like "10G"; 0: no limit'
    )
    parser.add_argument("--instances", type=_count, metavar="N", help="0: no limit")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    request = state_pb2.QuotaRequest(tenant=args.name, state_bytes=args.bytes, instances=args.instances)

    async def call(channel: grpc.aio.Channel, timeout: float) -> state_pb2.QuotaReply:
        return await state_pb2_grpc.StateStub(channel).Quota(request, timeout=timeout)

    reply = ask(args, call)
    if args.json:
        print(json.dumps(to_dict(reply)))
        return 0
    most = f"of {format_size(reply.state_bytes)}B" if reply.state_bytes else "without a limit"
    print(f"{printable(args.name)}: {format_size(reply.used_bytes)}B of state {most}")
    most = f"of {reply.instances:,}" if reply.instances else "without a limit"
    print(f"{printable(args.name)}: {reply.used_instances:,} instances {most}")
    return 0


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) >= 1 << 32:
        raise argparse.ArgumentTypeError("a number, 0 or more")
    return int(text)
