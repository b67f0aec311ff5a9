"""Wall clocks that jump by a day: they decide nothing but whether a ticket is still of use."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.errors import Reason, RoostError
from tests.faults.clock import faked_clock
from tests.faults.schedules import scene
from tests.faults.workload import AGENT
from tests.support.eventually import eventually

DAY = 86_400

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(not faked_clock(Path("clock")), reason="no libfaketime: make test installs it"),
]


async def test_fault_wall_clocks_jump(tmp_path: Path) -> None:
    """A coordinator in the future, or a node in the past, does no harm. The other way round each ticket has
    expired as soon as it is made: that is said, with what to do, and nothing is lost. An attached client is
    served on in any case, and all is well as soon as the clocks are."""
    async with scene(tmp_path) as real:
        cluster, workload = real.cluster, real.workload
        async with cluster.client() as client, client.attach(AGENT, "ana") as attached:
            await workload.append(attached, "ana", "before")
            for parts, jump in ((("c0",), DAY), (("c0",), -DAY), (("e0", "e1"), DAY), (("e0", "e1"), -DAY)):
                where = f"{parts} {jump:+}"
                harmless = (jump > 0) == (parts == ("c0",))
                for part in parts:
                    cluster.clock_file(part).write_text(f"{jump:+}\n")

                async def as_it_should(harmless: bool = harmless) -> bool:
                    async with client.attach(AGENT, "ben") as chat:
                        try:
                            await chat.send("read", timeout=2.0)
                        except RoostError as error:
                            return (
                                not harmless
                                and error.reason is Reason.TICKET_EXPIRED
                                and "clock" in error.hint
                            )
                        return harmless

                await eventually(as_it_should, 15.0, where)
                served = await workload.append(attached, "ana", f"during {where}")
                assert served.outcome == "ok", served
                for part in parts:
                    cluster.clock_file(part).unlink()
        assert await real.verdict() == []
        receipts = [op.receipt for op in workload.history.ops if op.receipt and op.user == "ana"]
        assert {(r.node, r.epoch) for r in receipts} == {(receipts[0].node, 1)}, "nothing has moved"
