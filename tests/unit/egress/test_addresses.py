"""Addresses that a name may lead to."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.egress.addresses import networks, permitted

PUBLIC = ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "64:ff9b::808:808", "::ffff:8.8.8.8"]
NOT_PUBLIC = [
    "127.0.0.1",
    "127.255.0.1",
    "0.0.0.0",
    "10.0.0.1",
    "172.16.0.1",
    "192.168.1.1",
    "169.254.169.254",
    "100.64.0.1",
    "192.0.0.1",
    "192.0.2.1",
    "198.18.0.1",
    "203.0.113.1",
    "224.0.0.1",
    "239.1.1.1",
    "240.0.0.1",
    "255.255.255.255",
    "::1",
    "::",
    "fe80::1",
    "fe80::1%1",
    "fc00::1",
    "fd00:ec2::254",
    "fec0::1",
    "ff02::1",
    "2001:db8::1",
    "2001::1",
    "2002:7f00:1::",
    "2002:a9fe:a9fe::1",
    "::ffff:127.0.0.1",
    "::ffff:169.254.169.254",
    "64:ff9b::7f00:1",
    "64:ff9b::a9fe:a9fe",
    "64:ff9b:1::1",
    "::127.0.0.1",
]
LAN = networks(["10.0.0.0/8", "127.0.0.0/8"])


def test_the_internet_may_be_reached() -> None:
    assert permitted(PUBLIC, False, ()) == PUBLIC


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_nothing_else_unless_both_the_agent_asks_and_the_operator_allows(address: str) -> None:
    assert permitted([address], False, ()) == []
    assert permitted([address], True, ()) == []
    assert permitted([address], False, LAN) == []


def test_what_the_operator_allows() -> None:
    found = ["10.1.2.3", "::ffff:10.1.2.3", "192.168.1.1", "127.0.0.1", "169.254.169.254", "8.8.8.8"]
    assert permitted(found, True, LAN) == ["10.1.2.3", "::ffff:10.1.2.3", "127.0.0.1", "8.8.8.8"]
    assert permitted(found, False, LAN) == ["8.8.8.8"]


@given(st.ip_addresses())
def test_the_kernels_own_view_of_private_is_never_let_out(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> None:
    if permitted([str(address)], False, ()):
        assert not any(getattr(address, f"is_{kind}") for kind in ("loopback", "link_local", "multicast"))
