"""Which addresses may be connected to. Pure.

Always true: an address that is not one of the public internet is used only if the agent's policy asks for
private ones there and the node's operator allows that network. So a name whose owner lets it lead to this
machine, its network or a cloud's metadata service (DNS rebinding) leads nowhere, however it is written.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
# What `is_global` takes for public, and is not, or leads on to addresses that nobody looks at.
_NOT_PUBLIC = tuple(
    ipaddress.ip_network(text)
    for text in ("192.88.99.0/24", "64:ff9b:1::/48", "2001::/32", "2002::/16", "fec0::/10", "5f00::/16")
)


def networks(texts: Iterable[str]) -> tuple[Network, ...]:
    """ValueError for what is none."""
    return tuple(ipaddress.ip_network(text) for text in texts)


def permitted(found: Iterable[str], private: bool, allowed: Sequence[Network]) -> list[str]:
    """Those of `found` that may be connected to."""
    return [text for text in found if _permitted(ipaddress.ip_address(text), private, allowed)]


def _permitted(address: Address, private: bool, allowed: Sequence[Network]) -> bool:
    if isinstance(address, ipaddress.IPv6Address):
        if address.scope_id:
            return False
        if address.ipv4_mapped:
            address = address.ipv4_mapped
        elif address in _NAT64:
            address = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    if _is_public(address):
        return True
    return private and any(address in network for network in allowed)


def _is_public(address: Address) -> bool:
    return (
        address.is_global
        and not address.is_multicast
        and not address.is_reserved
        and not any(address in network for network in _NOT_PUBLIC)
    )
