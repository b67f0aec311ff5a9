"""What coordinators and etcd go through: nothing committed is lost, and no instance ever has two owners."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import pytest_asyncio

from coordinator.ownership import Ownership
from coordinator.store.base import Put
from coordinator.store.etcd import open_etcd
from protos.v1 import link_pb2
from shared.errors import Reason, RoostError
from shared.identity import InstanceKey
from tests.support.coordinators import TTL, Caller, calling, config, in_process, key, own_process, serves
from tests.support.etcd import Etcd, free_ports, running_etcd
from tests.support.eventually import eventually
from tests.support.fake_node import FakeNode, running_node


@pytest_asyncio.fixture
async def etcd(tmp_path: Path) -> AsyncIterator[Etcd]:
    (tmp_path / "etcd").mkdir()
    async with running_etcd(tmp_path / "etcd") as running:
        yield running


@pytest_asyncio.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as entered:
        yield entered


@pytest_asyncio.fixture
async def pair(etcd: Etcd, tmp_path: Path, stack: AsyncExitStack) -> tuple[Caller, Caller]:
    """Two coordinators in this process."""
    one = await stack.enter_async_context(in_process(config("c1", etcd.endpoint, tmp_path)))
    two = await stack.enter_async_context(in_process(config("c2", etcd.endpoint, tmp_path)))
    await one.deploy()
    return one, two


async def join(stack: AsyncExitStack, callers: list[Caller], *nodes: FakeNode) -> None:
    for node in nodes:
        await stack.enter_async_context(running_node(node))
    for caller in callers:
        await caller.wait_nodes(*nodes)


async def test_two_coordinators_asked_at_once_agree_on_one_owner(
    pair: tuple[Caller, Caller], stack: AsyncExitStack
) -> None:
    """Nodes are linked to either, and the clients prefer different nodes: every choice is contested."""
    one, two = pair
    nodes = [FakeNode("a", [one.address]), FakeNode("b", [two.address]), FakeNode("c", [one.address])]
    await join(stack, [one, two], *nodes)
    dice = random.Random(1)
    contested = 0

    async def race(user: str) -> None:
        nonlocal contested
        prefer = dice.sample(["a", "b", "c"], 3)
        asked = [
            caller.resolve(user, rtt_ms={prefer[i]: 0.1, prefer[(i + 1) % 3]: 5, prefer[(i + 2) % 3]: 9})
            for i, caller in enumerate((one, two, one, two))
            for i in (i % 3,)
        ]
        answers = await asyncio.gather(*asked)
        assert len({(a.node, a.epoch) for a in answers}) == 1, answers
        assert answers[0].epoch == 1
        contested += len({r.epoch for n in nodes for r in n.reserves if r.key.user == user}) > 0 and (
            sum(r.key.user == user for n in nodes for r in n.reserves) > 1
        )

    for start in range(0, 300, 10):
        await asyncio.gather(*(race(f"u{i}") for i in range(start, start + 10)))
    assert contested > 200, f"only {contested} of 300 were really raced"
    shown = {i.key.user: (i.node, i.epoch) for i in (await two.status()).instances}
    assert len(shown) == 300
    assert {epoch for _, epoch in shown.values()} == {1}


async def test_moves_that_race_with_commits_never_give_an_epoch_two_owners(
    pair: tuple[Caller, Caller], etcd: Etcd, stack: AsyncExitStack
) -> None:
    one, two = pair
    nodes = {n.id: n for n in (FakeNode("a", [one.address]), FakeNode("b", [two.address]))}
    await join(stack, [one, two], *nodes.values())
    first = await one.resolve("ana")
    owners = {1: first.node}
    committed: dict[int, tuple[int, str]] = {}  # version -> (epoch, node), of acknowledged commits

    async def turns(node: FakeNode) -> None:
        while len(owners) < 40:
            try:
                epoch = max(owners)
                version = (await node.fetch(key("ana"), epoch)).version + 1
                await node.commit(key("ana"), epoch, version)
                assert version not in committed, "a version was committed twice"
                committed[version] = (epoch, node.id)
            except RoostError as error:
                assert error.reason is Reason.EPOCH_STALE, error
            await asyncio.sleep(0)

    async def moves(caller: Caller) -> None:
        while len(owners) < 40:
            owner = owners[max(owners)]
            reply = await caller.resolve("ana", exclude=[owner])
            assert owners.setdefault(reply.epoch, reply.node) == reply.node, "an epoch with two owners"
            await asyncio.sleep(0.005)

    async with asyncio.timeout(60):
        await asyncio.gather(*(turns(n) for n in nodes.values()), moves(one), moves(two))
    assert all(owners[epoch] == node for epoch, node in committed.values())
    async with open_etcd([etcd.endpoint]) as store:
        record = await Ownership(store, _NoCache(), time.time, 5.0).read(InstanceKey("acme", "chef", "ana"))
    assert record is not None
    assert record.value.version >= max(committed)
    assert sorted(committed) == list(range(1, len(committed) + 1)), "no acknowledged version is missing"


class _NoCache:
    def instance(self, key: InstanceKey) -> None: ...

    def learn_instance(self, stored: object) -> None: ...


async def test_a_node_is_reserved_through_the_coordinator_that_holds_its_link(
    pair: tuple[Caller, Caller], stack: AsyncExitStack
) -> None:
    one, two = pair
    far = FakeNode("far", [two.address])
    await join(stack, [one, two], far)
    assert (await one.resolve("ana")).node == "far"
    assert len(far.reserves) == 1
    far.refusal = RoostError(Reason.NODE_FULL, "no room", "elsewhere")
    with pytest.raises(RoostError) as caught:
        await one.resolve("bob")
    assert caught.value.reason is Reason.NO_ROOM
    assert "far is full" in caught.value.message
    near = FakeNode("near", [one.address])
    await join(stack, [one, two], near)
    moved = await one.resolve("ana", exclude=["far"])
    assert (moved.node, moved.epoch) == ("near", 2), "the other coordinator was asked whether far is fresh"
    await eventually(
        lambda: [(e.key.user, e.epoch) for e in far.evicted] == [("ana", 1)], 5, "told by its own"
    )


async def test_killing_the_coordinator_that_holds_a_link_moves_nothing(
    etcd: Etcd, tmp_path: Path, stack: AsyncExitStack
) -> None:
    dying = await stack.enter_async_context(own_process(config("c1", etcd.endpoint, tmp_path), tmp_path))
    first = await dying.ready()
    async with calling(first) as caller:
        await caller.deploy()
    other = await stack.enter_async_context(in_process(config("c2", etcd.endpoint, tmp_path)))
    nodes = [FakeNode(name, [first, other.address]) for name in "abc"]
    await join(stack, [other], *nodes)
    async with calling(first) as caller:
        placed = {f"u{i}": await caller.resolve(f"u{i}") for i in range(9)}
        by_id = {n.id: n for n in nodes}
        for user, reply in placed.items():
            await by_id[reply.node].fetch(key(user), 1)
            await by_id[reply.node].commit(key(user), 1, 1)
    await dying.kill()

    async def moved_over() -> bool:
        status = {n.node.id: (n.state, n.coordinator) for n in (await other.status()).nodes}
        return status == dict.fromkeys("abc", ("up", "c2"))

    await eventually(moved_over, 10, "the nodes register with the other coordinator")
    await asyncio.sleep(TTL * 3)  # longer than anything could take to be called lost
    for user, reply in placed.items():
        again = await other.resolve(user)
        assert (again.node, again.epoch) == (reply.node, 1)
        await by_id[reply.node].commit(key(user), 1, 2)
    assert not any(n.evicted for n in nodes)


async def test_nodes_that_die_with_their_coordinator_are_lost_after_its_lease_and_a_ttl(
    etcd: Etcd, tmp_path: Path, stack: AsyncExitStack
) -> None:
    dying = await stack.enter_async_context(own_process(config("c1", etcd.endpoint, tmp_path), tmp_path))
    first = await dying.ready()
    other = await stack.enter_async_context(in_process(config("c2", etcd.endpoint, tmp_path)))
    await other.deploy()
    await join(stack, [other], FakeNode("spare", [other.address]))
    async with running_node(FakeNode("a", [first])) as a:
        await other.wait_nodes(a)
        placed = await other.resolve("ana", rtt_ms={"a": 0.1, "spare": 9})
        assert placed.node == "a"
        await a.fetch(key("ana"), 1)
        await a.commit(key("ana"), 1, 1)
        await dying.kill()
    killed = time.monotonic()

    async def moved() -> bool:
        try:
            return (await other.resolve("ana", exclude=["a"])).epoch == 2
        except RoostError as error:
            assert error.reason is Reason.NODE_UNREACHABLE, error
            return False

    await eventually(moved, 4 * TTL + 6)
    assert time.monotonic() - killed > TTL, "not before a full TTL"
    found = await other.instance("ana")
    assert (found.node, found.epoch, found.version) == ("spare", 2, 1), "what was committed came along"


async def test_fault_a_coordinator_suspended_past_its_lease_calls_nobody_lost_when_it_wakes(
    etcd: Etcd, tmp_path: Path, stack: AsyncExitStack
) -> None:
    process = await stack.enter_async_context(own_process(config("c1", etcd.endpoint, tmp_path), tmp_path))
    address = await process.ready()
    caller = await stack.enter_async_context(calling(address))
    await caller.deploy()
    node = FakeNode("a", [address])
    await join(stack, [caller], node)
    await caller.resolve("ana")
    process.suspend()
    try:
        await asyncio.sleep(TTL * 3)
    finally:
        process.resume()
    seen = node.acknowledged
    await eventually(lambda: node.welcome and node.acknowledged > seen + 2, 10, "heartbeats go on")
    await asyncio.sleep(TTL * 2)
    assert "is lost" not in process.log()
    assert (await caller.node("a")).state == "up"
    assert (await caller.resolve("ana")).epoch == 1


async def test_fault_a_suspended_coordinators_nodes_may_go_elsewhere_and_it_accepts_that(
    etcd: Etcd, tmp_path: Path, stack: AsyncExitStack
) -> None:
    process = await stack.enter_async_context(own_process(config("c1", etcd.endpoint, tmp_path), tmp_path))
    address = await process.ready()
    other = await stack.enter_async_context(in_process(config("c2", etcd.endpoint, tmp_path)))
    await other.deploy()
    old = FakeNode("a", [address])
    await join(stack, [other], old)
    await other.resolve("ana")
    process.suspend()
    try:
        # As a node does after a TTL without an acknowledgement: it opens a new link, elsewhere.
        held = [link_pb2.Held(key=key("ana"), epoch=1, live=True)]
        again = FakeNode("a", [other.address], started_id=old.started_id, held=held)
        await stack.enter_async_context(running_node(again))
        await eventually(lambda: again.welcome, 5)
        await asyncio.sleep(TTL * 3)
    finally:
        process.resume()
    await eventually(lambda: old.ends, 10, "the stale link is ended")
    assert old.ends[0].reason is Reason.COORDINATOR_UNREACHABLE
    assert not again.evicted
    assert (await other.resolve("ana")).epoch == 1


async def test_fault_a_coordinator_killed_between_commits_loses_none(
    etcd: Etcd, tmp_path: Path, stack: AsyncExitStack
) -> None:
    settings = config("c1", etcd.endpoint, tmp_path, listen=f"127.0.0.1:{free_ports(1)[0]}")
    process = await stack.enter_async_context(own_process(settings, tmp_path))
    address = await process.ready()
    caller = await stack.enter_async_context(calling(address))
    await caller.deploy()
    node = FakeNode("a", [address])
    await join(stack, [caller], node)
    await caller.resolve("ana")
    acknowledged = 0
    for round_ in range(3):
        killing = asyncio.create_task(_kill_soon(process, 0.15))
        while not killing.done():
            try:
                await node.commit(key("ana"), 1, acknowledged + 1)
                acknowledged += 1
            except RoostError as error:
                assert error.reason is Reason.COORDINATOR_UNREACHABLE, error
            await asyncio.sleep(0)
        await process.start()
        await eventually(lambda: serves(caller), 15)
        await caller.wait_nodes(node)
        found = await caller.instance("ana")
        assert found.version >= acknowledged > round_
        assert found.epoch == 1
        await node.commit(key("ana"), 1, found.version)  # whatever was cut off can be repeated
        acknowledged = found.version
    assert (await caller.resolve("ana")).epoch == 1


async def _kill_soon(process: object, after: float) -> None:
    await asyncio.sleep(after)
    await process.kill()  # type: ignore[attr-defined]


async def test_the_signing_key_is_one_for_all_coordinators_and_survives_them(
    etcd: Etcd, tmp_path: Path
) -> None:
    keys = []
    for names in (("c1", "c2"), ("c3",)):
        async with AsyncExitStack() as stack:
            started = [in_process(config(name, etcd.endpoint, tmp_path)) for name in names]
            for caller in await asyncio.gather(*(stack.enter_async_context(s) for s in started)):
                node = await stack.enter_async_context(running_node(FakeNode("a", [caller.address])))
                await eventually(lambda node=node: node.welcome, 5)
                assert node.welcome is not None
                keys.append(list(node.welcome.ticket_keys))
    assert len(keys) == 3
    assert keys[0] == keys[1] == keys[2]


async def test_what_cannot_be_read_in_the_store_does_not_stop_the_rest(
    etcd: Etcd, tmp_path: Path, stack: AsyncExitStack
) -> None:
    async with open_etcd([etcd.endpoint]) as store:
        await store.txn([], [Put("instances/acme/chef/bad", b"{"), Put("nodes/bad", b"[]")])
    caller = await stack.enter_async_context(in_process(config("c1", etcd.endpoint, tmp_path)))
    await caller.deploy()
    await join(stack, [caller], FakeNode("a", [caller.address]))
    assert (await caller.resolve("ana")).epoch == 1
    with pytest.raises(RoostError) as caught:
        await caller.resolve("bad")
    assert caught.value.reason is Reason.INTERNAL
    assert "instances/acme/chef/bad" in caught.value.message


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("frob = 1", "unknown key 'frob'"),
        ("heartbeat = 1", "heartbeat"),
        ('heartbeat = "3s"', "at least 3 times"),
        ('listen = "0.0.0.0:1"', "advertise"),
        ('lease_ttl = "100ms"', "lease_ttl"),
    ],
)
def test_a_bad_configuration_is_a_message_and_exit_code_2(tmp_path: Path, line: str, says: str) -> None:
    file = tmp_path / "coordinator.toml"
    file.write_text(f'id = "c1"\netcd = ["127.0.0.1:1"]\nblobs = "memory:///"\n{line}\n')
    done = subprocess.run(
        [sys.executable, "-m", "coordinator", "--config", str(file)],
        capture_output=True,
        text=True,
        timeout=30,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr


async def test_a_coordinator_stops_on_sigterm_and_gives_its_lease_back(
    etcd: Etcd, tmp_path: Path, stack: AsyncExitStack
) -> None:
    process = await stack.enter_async_context(own_process(config("c1", etcd.endpoint, tmp_path), tmp_path))
    node = await stack.enter_async_context(running_node(FakeNode("a", [await process.ready()])))
    await eventually(lambda: node.welcome, 5)
    assert await process.stop(10) == 0, process.log()
    await eventually(lambda: node.ends, 5)
    assert node.ends[0].reason is Reason.COORDINATOR_UNREACHABLE
    async with open_etcd([etcd.endpoint]) as store:
        assert (await store.list("coordinators/")).records == ()
    assert "Traceback" not in process.log()
