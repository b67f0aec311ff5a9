"""What `roost jail plan` shows is what is carried out; what the kernel refuses is told so that it helps."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from edge_agent import specs
from edge_agent.control import Agent
from edge_agent.jail.api import JailSpec
from shared.errors import RoostError
from shared.resources import Resources
from tests.support.jailer import BUNDLE, ECHO, LIMITS, RunningJailer, needs_root, python, running_jailer, spec

_POLICY = """
[agent]
name = "echo"
[run]
entry = "echo:agent"
[resources]
memory = "96M"
cpu = 1.0
pids = 24
"""
_MODULE = "from roost import Agent\nagent = Agent()\n@agent.turn\ndef turn(turn): return turn.message\n"
_CAPACITY = 1 << 30
_MADE = re.compile(r" DEBUG test jailer edge_agent\.jail\.\w+: (\w+): (.*)")
_SILENT = ("agent's process", "zygote's child")  # have nobody to tell what they do


async def _printed(jailer: RunningJailer, way: str, tmp_path: Path) -> list[dict[str, Any]]:
    """By a node of the same configuration."""
    config = tmp_path / "edge.toml"
    config.write_text(f'{jailer.config.read_text()}\n[capacity]\nmemory = "{_CAPACITY >> 20}M"\n')
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "edge_agent", "--config", str(config)),
        *("--plan", "-", "--way", way, "--version", BUNDLE),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await process.communicate(_POLICY.encode())
    stages: list[dict[str, Any]] = json.loads(output)["stages"]
    return stages


async def _make(jailer: RunningJailer, way: str) -> None:
    jailer.bundle(BUNDLE, {"echo.py": _MODULE})
    agent = Agent.of(BUNDLE, _POLICY, "")
    need = agent.policy.need
    match way:
        case "exec":
            await (await jailer.jails.make(specs.of_instance("instance", agent, need, "", ""))).start()
        case "zygote":
            await jailer.jails.zygote(specs.of_zygote("zygote", agent, _CAPACITY, ""))
            instance = specs.of_instance("instance", agent, need, "", "zygote")
            await (await jailer.jails.make(instance)).start()
        case _:
            limits = Resources(128 << 20, 500, 64)
            await jailer.jails.task(JailSpec("task", BUNDLE, ("(what the agent asks for)",), limits=limits))


def _is_within(part: Sequence[str], whole: Sequence[str]) -> bool:
    return any(whole[at : at + len(part)] == part for at in range(len(whole)))


@needs_root
@pytest.mark.parametrize("way", ["exec", "zygote", "task"])
async def test_what_is_printed_is_what_is_carried_out(tmp_path: Path, way: str) -> None:
    async with running_jailer(level="DEBUG") as jailer:
        stages = await _printed(jailer, way, tmp_path)
        await _make(jailer, way)
        done: dict[str, list[str]] = {}
        for who, what in _MADE.findall(jailer.log()):
            done.setdefault(who, []).append(what)
    printed: dict[str, list[str]] = {}
    for stage in stages:
        operations = printed.setdefault(stage["who"], [])
        operations += stage["operations"]
        if stage["who"] not in (*_SILENT, "jailer", "zygote"):
            assert _is_within(stage["operations"], done[stage["who"]]), stage["who"]
    for who in _SILENT:
        printed.pop(who, None)
    if way == "zygote":  # the last two steps close even the file that it tells its progress in
        assert [o.partition(" ")[0] for o in printed["zygote"][-2:]] == ["filter", "execute"]
        del printed["zygote"][-2:]
    assert {who: sorted(what) for who, what in printed.items()} == {
        who: sorted(what) for who, what in done.items()
    }
    assert all(printed[who] == done[who] for who in printed if who != "jailer"), "in the same order"


async def test_a_refusal_of_the_jailers_own_part_names_operation_and_cause(jailer: RunningJailer) -> None:
    (jailer.data_dir / "jails/a").write_text("in the way")
    with pytest.raises(RoostError, match=r"make .*jails/a/state .*\((EEXIST|ENOTDIR)\)") as refused:
        await jailer.jails.make(spec("a", python(ECHO)))
    assert refused.value.hint
    assert not jailer.cgroups()
    (jailer.data_dir / "jails/a").unlink()
    jail = await jailer.jails.make(spec("a", python(ECHO)))
    await jail.start()


async def test_a_refusal_of_the_mounter_names_operation_and_cause(jailer: RunningJailer) -> None:
    zygote = await jailer.zygote("v2", ECHO)
    bundle = jailer.data_dir / "bundles/v2"
    bundle.rename(bundle.with_name("elsewhere"))
    with pytest.raises(RoostError, match=r"bind v2 of .*\(ENOENT\)") as refused:
        await jailer.forked("a", zygote)
    assert "missing" in refused.value.hint
    bundle.with_name("elsewhere").rename(bundle)
    await jailer.forked("a", zygote)


@needs_root
@pytest.mark.parametrize("step", ["join the jail's control groups", "set the host name to the jail's"])
async def test_a_refusal_of_a_shells_init_names_operation_and_cause(step: str) -> None:
    async with running_jailer(broken=step) as jailer:
        zygote = await jailer.zygote("v2", ECHO)
        for jail_id in "ab":
            with pytest.raises(RoostError, match=rf"{step}.*\(EBADF\)"):
                await jailer.forked(jail_id, zygote)
        await zygote.kill()
        assert not jailer.cgroups()


async def test_a_zygote_that_can_not_be_executed_says_so(jailer: RunningJailer) -> None:
    """All of its descriptors but the last are closed by then."""
    missing = JailSpec("zygote-a", BUNDLE, ("/none/python",), {}, LIMITS)
    with pytest.raises(RoostError, match=r"execute /none/python .*\(ENOENT\)") as refused:
        await jailer.jails.zygote(missing)
    assert "missing" in refused.value.hint
