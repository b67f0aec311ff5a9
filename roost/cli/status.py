"""`roost status`: the nodes, and where every instance is and why."""

from __future__ import annotations

import argparse
import json
import time

import grpc.aio

from protos.v1 import admin_pb2, admin_pb2_grpc, state_pb2
from roost.cli import _tables
from roost.cli._common import Commands, add_command, add_json, ask, printable, to_dict
from shared.units import format_size


def add(commands: Commands, common: argparse.ArgumentParser) -> None:
    add_json(add_command(commands, common, "status", "show nodes and instances", run))


def run(args: argparse.Namespace) -> int:
    reply = ask(args, fetch)
    if args.json:
        print(json.dumps(to_dict(reply)))
    else:
        _tables.show(
            _tables.nodes(reply),
            _tables.instances(reply),
            _tables.agents(reply),
            _tables.timers(reply),
            _tables.parked(reply),
        )
        if reply.HasField("collection"):
            print(_collection(reply.collection))
    return 0


def _collection(last: state_pb2.Collection) -> str:
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(last.began_unix))
    if last.error:
        return printable(f"blob store: collecting failed at {when}: {last.error}")
    told = f"blob store: {format_size(last.bytes)}B at {when}, {format_size(last.purged_bytes)}B then deleted"
    return f"{told}, {last.missing} NEEDED AND MISSING" if last.missing else told


async def fetch(channel: grpc.aio.Channel, timeout: float) -> admin_pb2.StatusReply:
    return await admin_pb2_grpc.AdminStub(channel).Status(admin_pb2.StatusRequest(), timeout=timeout)
