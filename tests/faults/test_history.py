"""The short version of what `make test-faults` does for minutes: some faults of one plan, and a verdict."""

from __future__ import annotations

from pathlib import Path

from tests.faults.run import run

FAULTS, SEED = 8, 2  # whose plan lets nodes get the agent's bundle before the blob store suffers


async def test_a_history_with_faults_keeps_the_promises(tmp_path: Path) -> None:
    result = await run(tmp_path, FAULTS, SEED)
    print(result)
    assert not result.violations
    assert result.injected.total() >= FAULTS
    assert result.outcomes["ok"] > 20, "clients were served meanwhile"
    assert len(result.history.held) > 20, "the observer saw the store"
