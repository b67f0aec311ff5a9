"""`roost status`: the nodes, and where every instance is and why."""

from __future__ import annotations

import argparse
import json

import grpc.aio

from protos.v1 import admin_pb2, admin_pb2_grpc
from roost.cli import _tables
from roost.cli._common import Commands, add_command, add_json, ask, to_dict


def add(commands: Commands, common: argparse.ArgumentParser) -> None:
    add_json(add_command(commands, common, "status", "show nodes and instances", run))


def run(args: argparse.Namespace) -> int:
    reply = ask(args, fetch)
    if args.json:
        print(json.dumps(to_dict(reply)))
    else:
        _tables.show(_tables.nodes(reply), _tables.instances(reply), _tables.agents(reply))
    return 0


async def fetch(channel: grpc.aio.Channel, timeout: float) -> admin_pb2.StatusReply:
    return await admin_pb2_grpc.AdminStub(channel).Status(admin_pb2.StatusRequest(), timeout=timeout)
