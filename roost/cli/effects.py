"""`roost effects AGENT --user U`: what turns that are not committed did outside, and what became of it."""

from __future__ import annotations

import argparse
import json
from typing import Any

import grpc.aio

from protos.v1 import admin_pb2, admin_pb2_grpc, common_pb2, effects_pb2
from roost.cli import _tables
from roost.cli._common import Commands, add_command, add_json, ask, tenant_of, to_dict
from shared.errors import Reason, RoostError

_ANSWERS = {"done": True, "not-done": False}


def add(commands: Commands, common: argparse.ArgumentParser) -> None:
    summary = "show what unfinished turns did outside, and say what became of it"
    parser = add_command(commands, common, "effects", summary, run)
    parser.add_argument("agent", metavar="AGENT")
    parser.add_argument("--user", required=True, metavar="U", help="whose instance")
    parser.add_argument(
        "--resolve",
        nargs=2,
        metavar=("CALL", "ANSWER"),
        help="say of an uncertain call that it is `done` or `not-done`; CALL is TURN:NUMBER, or its name",
    )
    parser.add_argument("--result", metavar="JSON", help="with `done`: what the call returns (default: null)")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    key = common_pb2.InstanceKey(tenant=tenant_of(args), agent=args.agent, user=args.user)
    if args.resolve is not None:
        _resolve(args, key)
    elif args.result is not None:
        raise RoostError(Reason.BAD_REQUEST, "a result of nothing", "--result goes with --resolve CALL done")
    reply = _fetch(args, key)
    if args.json:
        print(json.dumps(to_dict(reply)))
    else:
        _tables.show(_grid(reply))
    return 0


def _fetch(args: argparse.Namespace, key: common_pb2.InstanceKey) -> admin_pb2.EffectsReply:
    async def call(channel: grpc.aio.Channel, timeout: float) -> admin_pb2.EffectsReply:
        return await admin_pb2_grpc.AdminStub(channel).Effects(
            admin_pb2.EffectsRequest(key=key), timeout=timeout
        )

    return ask(args, call)


def _resolve(args: argparse.Namespace, key: common_pb2.InstanceKey) -> None:
    wanted, answer = args.resolve
    if answer not in _ANSWERS:
        raise RoostError(Reason.BAD_REQUEST, f"{answer!r} says nothing of a call", "say done or not-done")
    done = _ANSWERS[answer]
    if args.result is not None and not done:
        raise RoostError(Reason.BAD_REQUEST, "what was not done has no result", "leave --result out")
    turn_id, found = _find(_fetch(args, key), wanted)
    request = admin_pb2.SettleRequest(
        key=key, turn_id=turn_id, call=found, done=done, result=_checked(args.result or "null")
    )

    async def call(channel: grpc.aio.Channel, timeout: float) -> admin_pb2.SettleReply:
        return await admin_pb2_grpc.AdminStub(channel).Settle(request, timeout=timeout)

    ask(args, call)


def _find(reply: admin_pb2.EffectsReply, wanted: str) -> tuple[str, effects_pb2.Call]:
    calls = [(journal.turn_id, call) for journal in reply.turns for call in journal.calls]
    exact = [(turn, call) for turn, call in calls if _name(turn, call) == wanted]
    found = exact or [
        (turn, call) for turn, call in calls if call.name == wanted and call.state == effects_pb2.UNCERTAIN
    ]
    if not found:
        raise RoostError(
            Reason.BAD_REQUEST, f"there is no uncertain call {wanted}", "without --resolve, all are shown"
        )
    if len(found) > 1:
        names = ", ".join(_name(turn, call) for turn, call in found)
        raise RoostError(Reason.BAD_REQUEST, f"{wanted} may be any of {names}", "say which")
    return found[0]


def _checked(text: str) -> str:
    try:
        value: Any = json.loads(text)
    except ValueError as error:
        raise RoostError(
            Reason.BAD_REQUEST, f"{text!r} is not JSON: {error}", "write text as '\"text\"'"
        ) from error
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _grid(reply: admin_pb2.EffectsReply) -> _tables.Grid:
    rows = tuple(
        (
            _tables.Cell(_name(journal.turn_id, call), "bold"),
            _tables.Cell(call.name),
            _tables.Cell(effects_pb2.Repeat.Name(call.repeat).lower()),
            _tables.Cell(_state(call), "red" if call.state == effects_pb2.UNCERTAIN else ""),
            _tables.Cell(call.result),
        )
        for journal in reply.turns
        for call in journal.calls
    )
    headers = ("call", "name", "repeat", "state", "result")
    return _tables.Grid("calls of unfinished turns", headers, rows, "no unfinished turn has made a call")


def _state(call: effects_pb2.Call) -> str:
    return effects_pb2.CallState.Name(call.state).lower().replace("_", "-")


def _name(turn_id: str, call: effects_pb2.Call) -> str:
    return f"{turn_id}:{call.number}"
