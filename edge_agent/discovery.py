"""Nodes of one LAN find each other by multicast DNS (RFC 6762), service `_roost._tcp.local.` (RFC 6763).

What is heard is only a hint: anybody on the LAN can say anything. So a name heard here leads to no more
than a line in a status table and an address to try first; who is who is decided elsewhere.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from contextlib import suppress
from dataclasses import dataclass

from zeroconf import InterfaceChoice, ServiceStateChange, Zeroconf
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from shared import rpc
from shared.names import is_name

log = logging.getLogger(__name__)

SERVICE = "_roost._tcp.local."
_LOOKUP_MS = 3000


@dataclass(frozen=True, slots=True)
class Peer:
    node: str
    site: str
    address: str  # host:port


class Discovery:
    """Advertises this node and keeps a table of the others that were heard."""

    def __init__(self, node: str, site: str, bound: str, address: str) -> None:
        """`bound` is host:port that this node listens on, `address` what others should use."""
        self._node = node
        self._site = site
        self._interface = bound.rpartition(":")[0]
        self._host, _, port = address.rpartition(":")
        self._port = int(port)
        self._peers: dict[str, Peer] = {}
        self._lookups: set[asyncio.Task[None]] = set()

    @property
    def peers(self) -> list[Peer]:
        return sorted(self._peers.values(), key=lambda peer: peer.node)

    async def run(self) -> None:
        """Until cancelled. A network without multicast is logged once and waited out."""
        told = False
        while True:
            try:
                await self._serve()
            except (OSError, RuntimeError) as error:  # zeroconf's own for "no interface is up"
                if not told:
                    log.warning("mDNS does not work here, so this node finds no peers by it: %s", error)
                told = True
                await asyncio.sleep(30)

    async def _serve(self) -> None:
        everywhere = self._interface in ("0.0.0.0", "[::]", "")
        zeroconf = AsyncZeroconf(interfaces=InterfaceChoice.All if everywhere else [self._interface])
        try:
            await zeroconf.async_register_service(self._own_record(), allow_name_change=False)
            browser = AsyncServiceBrowser(zeroconf.zeroconf, SERVICE, handlers=[self._changed])
            try:
                await asyncio.Event().wait()
            finally:
                await browser.async_cancel()
        finally:
            for lookup in self._lookups:
                lookup.cancel()
            with suppress(TimeoutError):
                async with asyncio.timeout(2):
                    await zeroconf.async_unregister_all_services()
            await zeroconf.async_close()

    def _own_record(self) -> AsyncServiceInfo:
        return AsyncServiceInfo(
            SERVICE,
            f"{self._node}.{SERVICE}",
            addresses=[socket.inet_aton(socket.gethostbyname(self._host))],
            port=self._port,
            properties={"id": self._node, "site": self._site, "api": rpc.API_VERSION},
            server=f"{self._node}.local.",
        )

    def _changed(
        self, zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange
    ) -> None:
        if state_change is ServiceStateChange.Removed:
            self._peers.pop(name, None)
            return
        lookup = asyncio.get_running_loop().create_task(self._look_up(zeroconf, name), name=f"mdns {name}")
        self._lookups.add(lookup)
        lookup.add_done_callback(self._lookups.discard)

    async def _look_up(self, zeroconf: Zeroconf, name: str) -> None:
        info = AsyncServiceInfo(SERVICE, name)
        if not await info.async_request(zeroconf, _LOOKUP_MS):
            return
        texts = {
            k.decode(errors="replace"): (v or b"").decode(errors="replace")
            for k, v in info.properties.items()
        }
        node, site = texts.get("id", ""), texts.get("site", "")
        addresses = info.parsed_addresses()
        if not (is_name(node) and is_name(site) and addresses) or node == self._node:
            return
        if name not in self._peers:
            log.info("heard node %s of site %s at %s:%s", node, site, addresses[0], info.port)
        self._peers[name] = Peer(node, site, f"{addresses[0]}:{info.port}")
