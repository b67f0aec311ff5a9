"""`roost move AGENT --user U NODE`: one instance goes to another node, between two of its turns."""

from __future__ import annotations

import argparse
import json
import sys

import grpc.aio

from protos.v1 import admin_pb2, admin_pb2_grpc, common_pb2
from roost.cli._common import Commands, add_command, add_json, ask, tenant_of, to_dict
from shared.errors import Reason, RoostError
from shared.units import format_size

_LONGEST = 600.0  # seconds, for packages and gigabytes of state that have to be brought there first


def add(commands: Commands, common: argparse.ArgumentParser) -> None:
    parser = add_command(
        commands, common, "move", "move one instance to another node, between its turns", run
    )
    parser.add_argument("agent", metavar="AGENT")
    parser.add_argument("--user", required=True, metavar="U", help="whose instance")
    parser.add_argument("node", metavar="NODE", help="where to")
    parser.add_argument(
        "--wait",
        type=float,
        default=30.0,
        metavar="S",
        help="seconds for its turn to end; then it stays (30)",
    )
    parser.add_argument(
        "--now", action="store_true", help="do not wait for its turn: cut it off, to be run again there"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    if not 0 <= args.wait <= 3600:
        raise RoostError(Reason.BAD_REQUEST, f"--wait {args.wait:g}", "give seconds, 0 to 3600")

    async def call(channel: grpc.aio.Channel, timeout: float) -> admin_pb2.Moved:
        request = admin_pb2.MoveRequest(
            key=common_pb2.InstanceKey(tenant=tenant_of(args), agent=args.agent, user=args.user),
            node=args.node,
            turn_ms=max(1, round(args.wait * 1000)),
            now=args.now,
        )
        moving = admin_pb2_grpc.AdminStub(channel).Move(request, timeout=_LONGEST + args.wait)
        async for progress in moving:
            if progress.HasField("moved"):
                return progress.moved
            if not args.json:
                print(f"{progress.doing} ...", file=sys.stderr)
        raise RoostError(Reason.INTERNAL, "the coordinator did not say what came of it", "see `roost status`")

    moved = ask(args, call)
    if args.json:
        print(json.dumps(to_dict(moved)))
    else:
        print(_told(args, moved))
    return 0


def _told(args: argparse.Namespace, moved: admin_pb2.Moved) -> str:
    who = f"{args.agent} of {args.user}"
    if moved.source == moved.target:
        return f"{who} is on {moved.target} already."
    went = f"{who} went from {moved.source} to {moved.target} (epoch {moved.epoch})"
    if moved.trouble:
        return f"{went}, but does not run there yet: {moved.trouble}"
    if not moved.live:
        return f"{went}. It sleeps, and wakes there on its next turn."
    fetched = format_size(moved.prefetched_bytes)
    return f"{went}. It paused for {moved.pause_ms:.0f} ms; {fetched} were fetched before that."
