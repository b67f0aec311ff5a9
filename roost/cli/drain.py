"""`roost drain NODE`: it takes no new instances, and those that run there move elsewhere."""

from __future__ import annotations

import argparse
import sys
import time

import grpc.aio

from protos.v1 import admin_pb2, admin_pb2_grpc
from roost.cli._common import Commands, add_command, ask, printable
from shared.errors import Reason, RoostError

_LOOK = 0.5  # seconds between looks at how far it is
_NAMED = 5  # instances that one line names


def add(commands: Commands, common: argparse.ArgumentParser) -> None:
    parser = add_command(
        commands, common, "drain", "move what a node has elsewhere, and give it nothing new", run
    )
    parser.add_argument("node", metavar="NODE")
    parser.add_argument("--undo", action="store_true", help="let it take instances again")
    parser.add_argument("--wait", action="store_true", help="until nothing runs there, showing how many do")
    parser.add_argument(
        "--timeout", type=float, default=600.0, metavar="S", help="seconds that --wait waits (600)"
    )


def run(args: argparse.Namespace) -> int:
    reply = _drain(args)
    if args.undo:
        print(f"{args.node} takes new instances again.")
        return 0
    if args.wait:
        reply = _wait(args, reply)
    if reply.live == 0:
        asleep = f"; {reply.instances} sleep, and wake elsewhere" if reply.instances else ""
        print(f"{args.node} takes no new instances, and nothing runs there{asleep}: it can be stopped.")
        return 0
    print(f"{args.node} takes no new instances. {reply.live} still run there, and move between their turns.")
    return 0


def _wait(args: argparse.Namespace, reply: admin_pb2.DrainReply) -> admin_pb2.DrainReply:
    until = time.monotonic() + args.timeout
    told = ""
    while reply.live:
        waiting = "; ".join(reply.waiting[:_NAMED])
        text = f"{reply.live} still run on {args.node}" + (f" ({waiting})" if waiting else "")
        if text != told:
            print(printable(told := text), file=sys.stderr)
        if time.monotonic() > until:
            raise RoostError(
                Reason.DEADLINE,
                f"{text} after {args.timeout:g} s",
                f"`roost drain {args.node} --wait` waits on; `--undo` takes it back; "
                "`roost move --now` cuts one off",
            )
        time.sleep(_LOOK)
        reply = _drain(args)
    return reply


def _drain(args: argparse.Namespace) -> admin_pb2.DrainReply:
    """Also how far it is: draining what drains changes nothing."""

    async def call(channel: grpc.aio.Channel, timeout: float) -> admin_pb2.DrainReply:
        request = admin_pb2.DrainRequest(node=args.node, undo=args.undo)
        return await admin_pb2_grpc.AdminStub(channel).Drain(request, timeout=timeout)

    return ask(args, call)
