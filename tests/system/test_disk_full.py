"""A user whose agent fills its disk is told so, with advice, and loses nothing that was committed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from roost.client import AsyncChat
from shared.errors import Reason, RoostError
from tests.support.mesh import AGENTS, NORTH, running_mesh


async def refused(chat: AsyncChat, message: str) -> RoostError:
    with pytest.raises(RoostError) as caught:
        await chat.send(message)
    return caught.value


async def test_what_does_not_fit_is_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, [NORTH]) as mesh:
        await mesh.deploy(AGENTS / "probe", pids='32\ndisk = "16M"')
        async with mesh.client() as client, client.attach("probe", "ana") as ana:
            await ana.send("append one")
            await ana.send("fill a 8")
            too_large = await refused(ana, "fill b 17")  # one file: the agent sees it fail
            assert too_large.reason is Reason.TURN_FAILED
            assert "resources.disk" in too_large.hint
            too_much = await refused(ana, "fill b 9")  # together: refused at the end of the turn, or a quota
            assert too_much.reason in (Reason.STATE_TOO_LARGE, Reason.TURN_FAILED)
            assert "resources.disk" in too_much.hint
            assert json.loads((await ana.send("append two")).text) == ["one", "two"]
            assert json.loads((await ana.send("ls /state")).text) == ["a", "lines"]
