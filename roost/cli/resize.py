"""`roost resize AGENT --user U`: one instance gets another share of its node, at once and from then on."""

from __future__ import annotations

import argparse
import json

import grpc.aio

from protos.v1 import admin_pb2, admin_pb2_grpc, common_pb2
from roost.cli._common import Commands, add_command, add_json, ask, size_argument, tenant_of, to_dict
from shared.errors import Reason, RoostError
from shared.resources import Resources


def add(commands: Commands, common: argparse.ArgumentParser) -> None:
    parser = add_command(commands, common, "resize", "give one instance more or less of its node", run)
    parser.add_argument("agent", metavar="AGENT")
    parser.add_argument("--user", required=True, metavar="U", help="whose instance")
    parser.add_argument("--memory", type=size_argument, default=0, metavar="SIZE", help='like "256M"')
    parser.add_argument("--cpu", type=_millis, default=0, metavar="CORES", help='like "0.5"')
    parser.add_argument("--pids", type=int, default=0, metavar="N", help="processes and threads")
    parser.add_argument("--reset", action="store_true", help="back to what agent.toml says")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    size = Resources(args.memory, args.cpu, args.pids)
    if min(args.memory, args.cpu, args.pids) < 0 or (size == Resources()) != args.reset:
        raise RoostError(
            Reason.BAD_REQUEST, "nothing to change", "say --memory, --cpu or --pids; or --reset, alone"
        )

    async def call(channel: grpc.aio.Channel, timeout: float) -> admin_pb2.ResizeReply:
        request = admin_pb2.ResizeRequest(
            key=common_pb2.InstanceKey(tenant=tenant_of(args), agent=args.agent, user=args.user),
            size=size.to_proto(),
            reset=args.reset,
        )
        return await admin_pb2_grpc.AdminStub(channel).Resize(request, timeout=timeout)

    reply = ask(args, call)
    if args.json:
        print(json.dumps(to_dict(reply)))
    else:
        when = f"now, on {reply.node}" if reply.running else "when it wakes"
        print(f"{args.agent} of {args.user} has {Resources.from_proto(reply.size)} {when}.")
    return 0


def _millis(text: str) -> int:
    return round(float(text) * 1000)
