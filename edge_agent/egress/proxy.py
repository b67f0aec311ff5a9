"""The node's egress proxy: one gate for each jail that may reach something.

Always true: a jail whose policy allows nothing has neither a socket to ask at nor variables that name one; a
gate is opened for the one instance that lives in its jail, and its connections end with it.
"""

from __future__ import annotations

import asyncio
import resource
import socket
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from edge_agent.egress.credentials import Credentials
from edge_agent.egress.gate import Gate
from edge_agent.egress.outside import Outside
from edge_agent.jail.api import Jail
from shared.identity import InstanceKey
from shared.network_policy import PROXY_PORT, NetworkSection


def environment(network: NetworkSection) -> dict[str, str]:
    """For what runs in a jail with this policy, so that it finds the proxy."""
    if not network.any:
        return {}
    proxy, direct = f"http://127.0.0.1:{PROXY_PORT}", "localhost,127.0.0.1,::1"
    return {
        **dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), proxy),
        **dict.fromkeys(("NO_PROXY", "no_proxy"), direct),
        "NODE_USE_ENV_PROXY": "1",  # without which Node.js looks at none of these
    }


@dataclass(slots=True)
class _Place:
    """`gate` takes over `listening`."""

    jail: Jail
    listening: socket.socket
    gate: Gate | None = None


class Egress:
    """Of a node."""

    def __init__(self, outside: Outside, credentials: Credentials) -> None:
        self._outside = outside
        self._credentials = credentials
        self._places: dict[str, _Place] = {}
        # Of the whole node: each takes two descriptors, of which others need some, too.
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._slots = asyncio.Semaphore(max(16, min(4096, soft // 4)))
        self._ending: set[asyncio.Task[None]] = set()

    async def prepare(self, jail: Jail, network: NetworkSection) -> None:
        """Before the jail's agent starts, which could take the port otherwise. Errors are the jail's."""
        if network.any:
            self._places[jail.jail_id] = _Place(jail, await jail.listen(PROXY_PORT))

    def open(
        self, jail: Jail, key: InstanceKey, network: NetworkSection, may_leave: Callable[[], bool]
    ) -> None:
        """From now on `key` lives in the jail, and may reach what `network` says while `may_leave`."""
        place = self._places.get(jail.jail_id)
        if place is not None and place.gate is None:
            place.gate = Gate(
                place.listening, key, network, may_leave, self._outside, self._credentials, self._slots
            )

    def cut(self, jail_id: str) -> None:
        """Breaks off the jail's connections, at once. It may make new ones."""
        place = self._places.get(jail_id)
        if place is not None and place.gate is not None:
            self._end(place.gate.cut())

    def close(self, jail_id: str) -> None:
        """Breaks off the jail's connections, at once, and takes no more."""
        place = self._places.pop(jail_id, None)
        if place is None:
            return
        if place.gate is None:
            place.listening.close()
        else:
            self._end(place.gate.close())

    def prune(self) -> None:
        """Closes what was for jails that have ended."""
        for jail_id in [jail_id for jail_id, place in self._places.items() if place.jail.ended]:
            self.close(jail_id)

    def counts(self) -> Mapping[InstanceKey, Counter[str]]:
        """Decisions of the instances that run now: by `gate.ALLOWED` and `rules.Why`."""
        return {place.gate.key: place.gate.counts for place in self._places.values() if place.gate}

    async def aclose(self) -> None:
        for jail_id in list(self._places):
            self.close(jail_id)
        await asyncio.gather(*self._ending, return_exceptions=True)
        self._outside.close()

    def _end(self, tasks: list[asyncio.Task[None]]) -> None:
        for task in tasks:
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)
