"""Devices that the node's operator has named: in the jails that ask for them, and in no other."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
from pathlib import Path

import pytest

from edge_agent.jail import protocol
from edge_agent.jail.client import make_request
from shared.errors import Reason, RoostError
from tests.support.jailer import LIMITS, is_root, python, running_jailer, spec

# The first of these that this machine has. Opening it does nothing.
DEVICE = next((d for d in ("/dev/fuse", "/dev/loop-control", "/dev/net/tun") if Path(d).exists()), "")
CONFIG = f"""
[devices.bell]
paths = ["{DEVICE}"]
[devices.gone]
paths = ["/dev/roost-is-not-there"]
[devices.directory]
paths = ["/dev/pts"]
"""
LOOK = f"""
recv()
def look():
    try:
        with open("{DEVICE}", "rb") as f: return str(os.fstat(f.fileno()).st_rdev)
    except OSError as e: return "errno " + str(e.errno)
send(look().encode())
recv()
"""

pytestmark = pytest.mark.skipif(not (is_root() and DEVICE), reason="needs root, and a device to try")


@pytest.mark.parametrize("way", ["exec", "zygote"])
async def test_who_asks_for_it_can_use_it_and_nobody_else(way: str) -> None:
    with_bell = dataclasses.replace(LIMITS, devices=(("bell", 1),))
    async with running_jailer(CONFIG) as jailer:
        found = []
        for jail_id, limits in (("a", with_bell), ("b", LIMITS)):
            if way == "zygote":
                zygote = await jailer.zygote(f"v-{jail_id}", LOOK)
                wanted = dataclasses.replace(
                    spec(jail_id, ("/none",), limits), bundle=f"v-{jail_id}", zygote=zygote.jail_id
                )
            else:
                wanted = spec(jail_id, python(LOOK), limits)
            jail = await jailer.jails.make(wanted)
            assert jail.limits == limits
            await jail.start()
            await jail.send(b"look")
            async with asyncio.timeout(20.0):
                found.append((await jail.receive()).decode())
        assert found == [str(os.stat(DEVICE).st_rdev), "errno 2"]


async def test_what_can_not_be_given_is_said() -> None:
    async with running_jailer(CONFIG) as jailer:
        for name, words in (
            ("laser", "no device laser"),
            ("gone", "ENOENT"),
            ("directory", "ENODEV"),
        ):
            limits = dataclasses.replace(LIMITS, devices=((name, 1),))
            with pytest.raises(RoostError, match=words) as caught:
                await jailer.jails.make(spec("a", python(LOOK), limits))
            assert (caught.value.reason, bool(caught.value.hint)) == (Reason.JAIL_FAILED, True)
        assert not jailer.cgroups()


async def test_a_daemon_can_not_name_a_path() -> None:
    body = json.loads(json.dumps(protocol.encode(make_request(spec("a", python(LOOK))))))
    for name in ("/dev/sda", "../sda", "", "A"):
        with pytest.raises(protocol.Refused, match="device"):
            protocol.decode({**body, "devices": [name]})
    with pytest.raises(protocol.Refused, match="at most 16"):
        protocol.decode({**body, "devices": [f"d{n}" for n in range(17)]})
