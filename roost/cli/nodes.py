"""`roost nodes`: the machines of the mesh, with what each holds and whom it hears."""

from __future__ import annotations

import argparse
import json

from roost.cli import _tables
from roost.cli._common import Commands, add_command, add_json, ask, to_dict
from roost.cli.status import fetch


def add(commands: Commands, common: argparse.ArgumentParser) -> None:
    add_json(add_command(commands, common, "nodes", "show nodes: addresses, room and peers", run))


def run(args: argparse.Namespace) -> int:
    reply = ask(args, fetch)
    if args.json:
        print(json.dumps({"nodes": [to_dict(node) for node in reply.nodes]}))
    else:
        _tables.show(_tables.nodes(reply), _tables.addresses(reply))
    return 0
