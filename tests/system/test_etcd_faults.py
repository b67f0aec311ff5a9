"""etcd is down, restarted, or slow to answer a lease: calls say so in time, and nothing committed is lost."""

from __future__ import annotations

import asyncio
import signal
import time
from contextlib import AsyncExitStack
from pathlib import Path

from grpc_health.v1 import health_pb2, health_pb2_grpc

from shared.errors import Reason, RoostError
from tests.support.coordinators import TTL, calling, config, in_process, key, own_process, serves
from tests.support.etcd import Etcd, free_ports
from tests.support.eventually import eventually
from tests.support.fake_node import FakeNode
from tests.system.test_coordinator_faults import etcd, join, pair, stack

__all__ = ["etcd", "pair", "stack"]


async def test_fault_etcd_down_every_call_says_so_within_its_deadline_and_goes_on_after(
    etcd: Etcd, tmp_path: Path, stack: AsyncExitStack
) -> None:
    caller = await stack.enter_async_context(in_process(config("c1", etcd.endpoint, tmp_path)))
    await caller.deploy()
    node = FakeNode("a", [caller.address])
    await join(stack, [caller], node)
    await caller.resolve("ana")
    await node.fetch(key("ana"), 1)
    await node.commit(key("ana"), 1, 1)
    for away, back in (((etcd.stop), etcd.start), (_suspended(etcd), _resumed(etcd))):
        await away()
        try:
            begun = time.monotonic()
            results = await asyncio.gather(
                caller.resolve(f"new-{begun}", timeout=5),
                node.commit(key("ana"), 1, 2),
                node.fetch(key("ana"), 1),
                return_exceptions=True,
            )
            assert [getattr(r, "reason", r) for r in results] == [Reason.STORE_UNAVAILABLE] * 3
            assert all(r.hint for r in results)  # type: ignore[union-attr]
            assert time.monotonic() - begun < 5
            reply = await caller.resolve("ana")
            assert reply.epoch == 1, "who is placed already can go on being found"
        finally:
            await back()

        async def again() -> bool:
            try:
                await node.commit(key("ana"), 1, 2)
                return True
            except RoostError as error:
                assert error.reason in (Reason.STORE_UNAVAILABLE, Reason.COORDINATOR_UNREACHABLE), error
                return False

        await eventually(again, 15)
    await caller.wait_nodes(node)
    assert (await caller.resolve("ana")).epoch == 1
    assert (await caller.instance("ana")).version == 2


def _suspended(etcd: Etcd) -> object:
    async def suspend() -> None:
        etcd.suspend()

    return suspend


def _resumed(etcd: Etcd) -> object:
    async def resume() -> None:
        etcd.resume()

    return resume


async def test_fault_no_heartbeat_is_acknowledged_while_the_own_lease_may_be_over(
    etcd: Etcd, tmp_path: Path, stack: AsyncExitStack
) -> None:
    """By then another coordinator may be giving its instances away: the node must stop trusting itself."""
    caller = await stack.enter_async_context(in_process(config("c1", etcd.endpoint, tmp_path)))
    node = FakeNode("a", [caller.address])
    await join(stack, [caller], node)
    etcd.suspend()
    try:
        await asyncio.sleep(TTL + 0.5)
        stopped_at = node.acknowledged
        await asyncio.sleep(1.0)
        assert node.acknowledged == stopped_at
        health = await health_pb2_grpc.HealthStub(caller.channel).Check(
            health_pb2.HealthCheckRequest(), timeout=5
        )
        assert health.status == health_pb2.HealthCheckResponse.NOT_SERVING
    finally:
        etcd.resume()
    await eventually(lambda: node.acknowledged > stopped_at, 15)
    await caller.wait_nodes(node)


async def test_fault_etcd_restarted_again_and_again_no_acknowledged_commit_is_lost(
    etcd: Etcd, tmp_path: Path, stack: AsyncExitStack
) -> None:
    caller = await stack.enter_async_context(in_process(config("c1", etcd.endpoint, tmp_path)))
    await caller.deploy()
    node = FakeNode("a", [caller.address])
    await join(stack, [caller], node)
    users = [f"u{i}" for i in range(4)]
    for user in users:
        await caller.resolve(user)
    acknowledged = dict.fromkeys(users, 0)
    ended = asyncio.Event()

    async def turns(user: str) -> None:
        while not ended.is_set():
            try:
                await node.commit(key(user), 1, acknowledged[user] + 1)
                acknowledged[user] += 1
            except RoostError as error:
                assert error.reason in (Reason.STORE_UNAVAILABLE, Reason.COORDINATOR_UNREACHABLE), error
                await asyncio.sleep(0.02)

    async with asyncio.TaskGroup() as group:
        for user in users:
            group.create_task(turns(user))
        for _ in range(3):
            await asyncio.sleep(0.3)
            await etcd.restart()
        before = dict(acknowledged)
        await eventually(lambda: all(acknowledged[u] > before[u] for u in users), 15, "commits go on")
        ended.set()
    shown = {i.key.user: (i.epoch, i.version) for i in (await caller.status()).instances}
    for user in users:
        assert shown[user][0] == 1
        assert acknowledged[user] <= shown[user][1] <= acknowledged[user] + 1


async def test_etcd_down_at_the_start_it_waits_says_so_and_goes_on(tmp_path: Path) -> None:
    (tmp_path / "etcd").mkdir()
    later = Etcd(tmp_path / "etcd")
    listen = f"127.0.0.1:{free_ports(1)[0]}"
    async with own_process(config("c1", later.endpoint, tmp_path, listen), tmp_path) as process:
        async with calling(listen) as caller:

            async def refused() -> RoostError | None:
                try:
                    await caller.status()
                except RoostError as error:
                    return error if error.reason is Reason.STORE_UNAVAILABLE else None
                return None

            error = await eventually(refused, 10)
            assert "waiting for etcd" in error.message
            assert error.hint
            stub = health_pb2_grpc.HealthStub(caller.channel)
            health = await stub.Check(health_pb2.HealthCheckRequest(), timeout=5)
            assert health.status == health_pb2.HealthCheckResponse.NOT_SERVING
            await eventually(lambda: "waiting for etcd" in process.log(), 10)
            try:
                await later.start()
                await process.ready()
                assert await serves(caller)
            finally:
                await later.stop(signal.SIGKILL)
