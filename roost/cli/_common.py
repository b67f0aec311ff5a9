"""What the subcommands share: their parser, the coordinators, JSON, and text that is safe for a terminal."""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar

import grpc.aio
from google.protobuf.message import Message

from roost._mesh import Coordinators
from roost._where import find_coordinators
from shared.errors import RoostError
from shared.units import parse_size

T = TypeVar("T")

ADMIN_TIMEOUT = 10.0  # seconds for a question to the coordinators

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Commands(Protocol):
    """What argparse's subparsers action offers."""

    def add_parser(self, name: str, **options: Any) -> argparse.ArgumentParser: ...


def add_command(
    commands: Commands,
    common: argparse.ArgumentParser,
    name: str,
    summary: str,
    run: Callable[[argparse.Namespace], int],
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, parents=[common], help=summary, description=summary)
    parser.set_defaults(run=run)
    return parser


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def size_argument(text: str) -> int:
    """The type of an argument: bytes, written like 64M."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def tenant_of(args: argparse.Namespace) -> str:
    return getattr(args, "tenant", "default")


def coordinators_of(args: argparse.Namespace) -> tuple[str, ...]:
    return find_coordinators(getattr(args, "coordinator", None))


def ask(args: argparse.Namespace, call: Callable[[grpc.aio.Channel, float], Awaitable[T]]) -> T:
    """What the first coordinator that can be reached answers."""

    async def asking() -> T:
        coordinators = Coordinators(coordinators_of(args))
        try:
            return await coordinators.ask(call, ADMIN_TIMEOUT)
        finally:
            await coordinators.close()

    return asyncio.run(asking())


def tell(error: RoostError) -> None:
    """Says what is wrong, and what to do about it, on standard error."""
    print(f"roost: {printable(error.message)}", file=sys.stderr)
    if error.hint:
        print(f"hint: {printable(error.hint)}", file=sys.stderr)


def printable(text: str) -> str:
    """`text` without control characters: an agent must not steer the terminal of who reads it."""
    return _CONTROL.sub("", text.replace("\r\n", "\n"))


def for_stdout(text: str) -> str:
    """Text from an agent or a log, as it is for programs, made safe for a terminal."""
    return printable(text) if sys.stdout.isatty() else text


def to_dict(message: Message) -> dict[str, Any]:
    """A message as JSON can hold it: names as in the .proto, enums in lower case, absent messages as null."""
    return {field.name: _field(message, field) for field in message.DESCRIPTOR.fields}


def _field(message: Message, field: Any) -> Any:
    value = getattr(message, field.name)
    if field.is_repeated:
        return [_value(field, item) for item in value]
    if field.message_type is not None and not message.HasField(field.name):
        return None
    return _value(field, value)


def _value(field: Any, value: Any) -> Any:
    if field.message_type is not None:
        return to_dict(value)
    if field.enum_type is not None:
        return field.enum_type.values_by_number[value].name.lower()
    return value
