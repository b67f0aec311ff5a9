"""`roost drain NODE`: it takes no new instances, and those that it has move when their users next call."""

from __future__ import annotations

import argparse

import grpc.aio

from protos.v1 import admin_pb2, admin_pb2_grpc
from roost.cli._common import Commands, add_command, ask


def add(commands: Commands, common: argparse.ArgumentParser) -> None:
    parser = add_command(commands, common, "drain", "let a node take no new instances", run)
    parser.add_argument("node", metavar="NODE")
    parser.add_argument("--undo", action="store_true", help="let it take instances again")


def run(args: argparse.Namespace) -> int:
    async def call(channel: grpc.aio.Channel, timeout: float) -> admin_pb2.DrainReply:
        request = admin_pb2.DrainRequest(node=args.node, undo=args.undo)
        return await admin_pb2_grpc.AdminStub(channel).Drain(request, timeout=timeout)

    reply = ask(args, call)
    if args.undo:
        print(f"{args.node} takes new instances again.")
    elif reply.instances == 0:
        print(f"{args.node} takes no new instances, and has none: it can be stopped.")
    else:
        print(f"{args.node} takes no new instances. It owns {reply.instances}; each moves on its next turn.")
    return 0
