"""What one jail wrote, shown read-only in others."""

from __future__ import annotations

from dataclasses import replace

import pytest

from edge_agent.jail.api import JailGone
from shared.errors import RoostError
from tests.support.jailer import ECHO, RunningJailer, python, spec

WRITES = "import os; os.chmod('/state', 0o755); open('/state/flour', 'w').write('wheat'); send(b'.')\n" + ECHO
READS = """
import os
flour = open("/packages/flour").read()
try: open("/packages/flour", "w")
except OSError as error: flour += f", {error.strerror}"
os.statvfs("/packages").f_flag & os.ST_NOSUID and os.statvfs("/packages").f_flag & os.ST_NODEV or 1 / 0
send(flour.encode())
"""


async def test_packages_are_read_only_and_stay_while_they_are_shown(jailer: RunningJailer) -> None:
    writer = await jailer.jails.make(spec("packages-a", python(WRITES)))
    await writer.start()
    await writer.receive()
    shown = replace(spec("a", python(READS + ECHO)), packages="packages-a")
    with pytest.raises(RoostError, match="still runs"):
        await jailer.jails.make(shown)
    await writer.kill()
    reader = await jailer.jails.make(shown)
    await reader.start()
    assert await reader.receive() == b"wheat, Read-only file system"
    with pytest.raises(RoostError, match="stays"):
        await jailer.jails.discard("packages-a")
    await reader.kill()
    await jailer.jails.discard("packages-a")
    with pytest.raises(RoostError, match="packages-a/state"):
        await jailer.jails.make(shown)
    with pytest.raises(RoostError, match="packages"):
        await jailer.jails.make(replace(shown, packages="../../etc"))


async def test_a_state_that_its_owner_keeps_to_itself_is_no_package(jailer: RunningJailer) -> None:
    writer = await jailer.jails.make(spec("b", python(WRITES.replace("0o755", "0o700"))))
    await writer.start()
    await writer.receive()
    await writer.kill()
    reader = await jailer.jails.make(replace(spec("a", python(READS)), packages="b"))
    await reader.start()
    with pytest.raises(JailGone) as gone:
        await reader.receive()
    assert "PermissionError" in gone.value.exit.stderr_tail
