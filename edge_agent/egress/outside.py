"""The node's way out: names are resolved, addresses checked, connections made.

Always true: a name is resolved once and the connection goes to an address that was checked. How it can fail:
Denied says how, in time.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from edge_agent.egress.addresses import Network, permitted
from edge_agent.egress.messages import MAX_ANSWER_HEAD
from edge_agent.egress.rules import Denied, Target, Why
from shared.network_policy import is_address

log = logging.getLogger(__name__)

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Resolve = Callable[[str], Awaitable[Sequence[str]]]

_RESOLVE_SECONDS, _CONNECT_SECONDS = 5.0, 10.0
_MOST_ADDRESSES = 4  # that are tried, each with its part of the time
_RESOLVERS = 8  # names of a whole node at the same time; threads of their own, since some take long


class Outside:
    """`ca_file`: certificates to trust besides the system's."""

    def __init__(
        self, private_networks: tuple[Network, ...], ca_file: Path | None, resolve: Resolve | None = None
    ) -> None:
        self._private_networks = private_networks
        self._ca_file = ca_file
        self._resolve = resolve or self._ask_system
        self._threads: ThreadPoolExecutor | None = None
        self._trust: asyncio.Task[ssl.SSLContext] | None = None

    def close(self) -> None:
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)

    async def connect(self, target: Target, tls: bool) -> Streams:
        """To the target; `tls` is spoken from here, and its certificate checked. Denied if it can't be."""
        addresses = (await self._addresses(target))[:_MOST_ADDRESSES]
        trust = await self._trusted() if tls else None
        problem = Denied(Why.UNREACHABLE, f"{target.authority} has no address")
        for address in addresses:
            try:
                async with asyncio.timeout(_CONNECT_SECONDS / len(addresses)):
                    return await asyncio.open_connection(
                        address,
                        target.port,
                        limit=MAX_ANSWER_HEAD,
                        ssl=trust,
                        server_hostname=target.host if tls else None,
                    )
            except TimeoutError:
                problem = Denied(Why.TIMED_OUT, f"{target.authority} did not answer in time")
            except ssl.SSLCertVerificationError as error:
                problem = _unreachable(target, f"its certificate is not trusted: {error.verify_message}")
            except OSError as error:
                problem = _unreachable(target, error.strerror or type(error).__name__)
        raise problem

    async def _addresses(self, target: Target) -> list[str]:
        if is_address(target.host):
            found: Sequence[str] = (target.host,)
        else:
            try:
                async with asyncio.timeout(_RESOLVE_SECONDS):
                    found = await self._resolve(target.host)
            except TimeoutError:
                raise Denied(
                    Why.TIMED_OUT, f"the name {target.host} was not resolved in {_RESOLVE_SECONDS:g} s"
                ) from None
            except OSError as error:
                raise Denied(Why.NAME_UNKNOWN, f"the name {target.host} leads nowhere: {error}") from error
        usable = permitted(found, target.private, self._private_networks)
        if not usable:
            log.warning("egress: %s leads to %s, which may not be reached", target.host, ", ".join(found))
            raise Denied(
                Why.ADDRESS_DENIED,
                f"{target.host} leads to an address that is not one of the internet",
                "if it should: private = true in agent.toml, and the node's operator allows the network in "
                "edge.toml: [egress] private_networks",
            )
        return usable

    async def _ask_system(self, host: str) -> Sequence[str]:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(_RESOLVERS, "egress-names")
        ask = functools.partial(socket.getaddrinfo, host, None, type=socket.SOCK_STREAM)
        answers = await asyncio.get_running_loop().run_in_executor(self._threads, ask)
        return list(dict.fromkeys(str(answer[4][0]) for answer in answers))

    async def _trusted(self) -> ssl.SSLContext:
        """Made when first needed, as it costs memory and time."""
        if self._trust is None:
            self._trust = asyncio.create_task(
                asyncio.to_thread(_trust, self._ca_file), name="egress certificates"
            )
        try:
            return await asyncio.shield(self._trust)
        except OSError as error:  # of ssl, too
            self._trust = None
            log.error("egress: certificates can't be read: %s", error)  # noqa: TRY400
            raise Denied(
                Why.UNREACHABLE, "this node can't check certificates", "its operator: see the node's log"
            ) from error


def _unreachable(target: Target, problem: str) -> Denied:
    return Denied(Why.UNREACHABLE, f"{target.authority} can't be reached: {problem}")


def _trust(ca_file: Path | None) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if ca_file is not None:
        context.load_verify_locations(ca_file)
    return context
