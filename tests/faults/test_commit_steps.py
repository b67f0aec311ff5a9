"""The owner dies at each step between a commit and its record: no turn is lost, none is applied twice."""

from __future__ import annotations

from pathlib import Path

from tests.faults.schedules import scene

STEPS = ("node.commit.answered", "node.commit.told", "node.commit.recorded")


async def test_a_node_or_its_daemon_dies_at_each_step_after_the_commit(tmp_path: Path) -> None:
    async with scene(tmp_path) as real:
        for step in STEPS:
            await real.append_during(
                step.rpartition(".")[2], lambda owner, at=step: real.nemesis.at(owner, at, "kill")
            )
        assert await real.verdict() == []
        assert real.workload.outcomes["ok"] >= 3 * len(STEPS), "turns were answered, too"
