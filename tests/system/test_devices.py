"""An agent that needs a device goes to a node that has one left, and finds it there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from shared.errors import RoostError
from tests.support.mesh import AGENTS, NORTH, SOUTH, running_mesh

DEVICE = next((d for d in ("/dev/fuse", "/dev/loop-control") if Path(d).exists()), "")


@pytest.mark.skipif(not DEVICE, reason="no device to try")
async def test_devices_are_counted_where_they_are(tmp_path: Path) -> None:
    south = replace(SOUTH, more=f'[devices.bell]\npaths = ["{DEVICE}"]\ncount = 1\n')
    async with running_mesh(tmp_path, [NORTH, south]) as mesh:
        await mesh.deploy(AGENTS / "probe", pids='32\ndevices = ["bell"]')
        near_north = (59.9, 10.8)
        async with mesh.client(near_north) as client, client.attach("probe", "ana") as ana:
            reply = await ana.send("ls /dev")
            assert reply.receipt.node == "edge-south"
            assert f'"{Path(DEVICE).name}"' in reply.text
            (node,) = [n for n in (await mesh.status()).nodes if n.node.id == "edge-south"]
            assert dict(node.reserved.devices) == dict(node.node.capacity.devices) == {"bell": 1}
            async with client.attach("probe", "ben") as ben:
                with pytest.raises(RoostError) as refused:
                    await ben.send("echo hi", timeout=3.0)
            assert "edge-south has no bell left" in refused.value.message
            assert "edge-north has no bell" in refused.value.message
