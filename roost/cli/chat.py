"""`roost chat AGENT --user U`: one message with --message, otherwise a conversation."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import signal
import sys
from collections.abc import Iterator

from rich.console import Console
from rich.live import Live
from rich.text import Text

from roost.cli._common import (
    Commands,
    add_command,
    add_json,
    coordinators_of,
    for_stdout,
    printable,
    tell,
    tenant_of,
)
from roost.client import Chat, Client, Delta, Reply, Restarted, Waiting
from shared.errors import RoostError

_TIMEOUT = 60.0


def add(commands: Commands, common: argparse.ArgumentParser) -> None:
    parser = add_command(commands, common, "chat", "talk to a user's instance of an agent", run)
    parser.add_argument("agent", metavar="AGENT")
    parser.add_argument("--user", required=True, help="whose instance it is")
    parser.add_argument("--message", help="send this one message, print the reply and end")
    parser.add_argument("--turn-id", help="repeat the turn of this id: it is applied once (with --message)")
    parser.add_argument(
        "--near", type=_position, metavar="LAT,LON", help="where the user is (--near=-33.9,18.4)"
    )
    parser.add_argument(
        "--timeout", type=_seconds, default=_TIMEOUT, metavar="SECONDS", help="for a turn, all tries included"
    )
    add_json(parser)
    parser.set_defaults(usage_error=parser.error)


def run(args: argparse.Namespace) -> int:
    if args.message is None and (args.json or args.turn_id is not None):
        args.usage_error("--json and --turn-id go with --message")
    with Client(coordinators_of(args), tenant_of(args), args.near) as client:
        with client.attach(args.agent, args.user) as chat:
            if args.message is None:
                return _converse(chat, args)
            return _say_once(chat, args)


def _say_once(chat: Chat, args: argparse.Namespace) -> int:
    with _interrupt_cancels(chat):
        reply = chat.send(args.message, args.turn_id, args.timeout)
    if args.json:
        told = {
            "reply": reply.text,
            "receipt": dataclasses.asdict(reply.receipt),
            "turn_id": reply.turn_id,
            "why": reply.why,
        }
        print(json.dumps(told))
        return 0
    print(for_stdout(reply.text))
    if sys.stdout.isatty():
        Console(highlight=False).print(_receipt(reply))
    return 0


def _converse(chat: Chat, args: argparse.Namespace) -> int:
    console = Console(highlight=False)
    prompt = ""
    if sys.stdin.isatty() and console.is_terminal:
        prompt = "> "
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # gives input() editing and history
        console.print(
            Text(f"Talking to {args.agent} as {args.user}. Ctrl-C cancels a turn, Ctrl-D ends it.", "dim")
        )
    failed = False
    while True:
        try:
            message = input(prompt)
        except EOFError:
            return 1 if failed and not prompt else 0
        if not message.strip():
            continue
        try:
            reply = _stream(console, chat, message, args.timeout)
        except RoostError as error:
            failed = True
            tell(error)
            continue
        print(for_stdout(reply.text), flush=True)
        if prompt:
            console.print(_receipt(reply))


def _stream(console: Console, chat: Chat, message: str, timeout: float) -> Reply:
    """Shows the reply while it is provisional; what is void vanishes. Returns the committed one."""
    said = ""
    with _interrupt_cancels(chat), Live(console=console, transient=True, auto_refresh=False) as live:
        for event in chat.stream(message, timeout=timeout):
            match event:
                case Delta(text):
                    said += text
                case Restarted():
                    said = ""
                case Waiting(text):
                    if console.is_terminal:
                        live.update(Text(printable(f"({text})"), "dim italic"), refresh=True)
                    continue
                case Reply():
                    return event
            if console.is_terminal:
                live.update(Text(printable(said), "dim"), refresh=True)
    raise AssertionError("a stream ends with a reply or an error")


@contextlib.contextmanager
def _interrupt_cancels(chat: Chat) -> Iterator[None]:
    """The first Ctrl-C cancels the turn, which is then waited for: it says what came of it. The second ends
    this program, as ever."""

    def cancel(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, before)
        chat.cancel()
        print("roost: cancelling this turn; Ctrl-C again leaves at once", file=sys.stderr)

    before = signal.signal(signal.SIGINT, cancel)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _receipt(reply: Reply) -> Text:
    receipt = reply.receipt
    parts = [
        receipt.node,
        f"epoch {receipt.epoch}",
        f"state version {receipt.version}",
        f"resumed from {receipt.resumed_from}",
        reply.why,
    ]
    if not receipt.durable:
        parts.append("not committed yet")
    if receipt.replayed:
        parts.append("applied before: this is its recorded reply")
    text = Text(printable(" · ".join(part for part in parts if part)), "dim")
    if receipt.lost:
        text.append(printable("\nlost: " + ", ".join(receipt.lost)), "bold red")
    return text


def _position(text: str) -> tuple[float, float]:
    try:
        latitude, longitude = (float(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: write LAT,LON in degrees, like 59.91,10.75") from error
    if not (-90 <= latitude <= 90 and -180 <= longitude <= 180):
        raise argparse.ArgumentTypeError(f"{text!r} is not on this planet")
    return latitude, longitude


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds") from error
    if not 0 < seconds <= 86_400:
        raise argparse.ArgumentTypeError("must be more than 0 and at most a day")
    return seconds
