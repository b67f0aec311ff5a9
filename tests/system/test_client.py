"""The client against real gRPC: what it does when nodes and coordinators fail."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from roost import AsyncClient, Client
from roost.client import Delta, Reply, Restarted
from shared.errors import Reason, RoostError
from shared.rpc import MAX_TURN_BYTES
from tests.support.eventually import eventually
from tests.support.fake_mesh import (
    FakeCoordinator,
    FakeMesh,
    FakeNode,
    cancellable,
    dying,
    failing,
    silent,
)


@pytest.fixture
async def mesh() -> AsyncIterator[FakeMesh]:
    async with FakeMesh() as mesh:
        yield mesh


async def two_nodes(mesh: FakeMesh) -> tuple[FakeNode, FakeNode, FakeCoordinator]:
    north, south = FakeNode("north"), FakeNode("south")
    coordinator = FakeCoordinator(north, south)
    await mesh.add(north, south, coordinator)
    return north, south, coordinator


def refusal(reason: Reason) -> RoostError:
    return RoostError(reason, "not now", "later, perhaps")


async def test_turns_of_a_chat_share_one_resolve(mesh: FakeMesh) -> None:
    north, _, coordinator = await two_nodes(mesh)
    async with AsyncClient([coordinator.address], position=(59.9, 10.7)) as client:
        async with client.attach("hello", "ana") as chat:
            first = await chat.send("hi")
            second = await chat.send("again", turn_id="chosen")
    assert (first.text, first.receipt.node, first.receipt.resumed_from) == ("HI", "north", "new")
    assert (second.receipt.version, second.receipt.resumed_from, second.turn_id) == (2, "live", "chosen")
    assert second.why == "the nearest with room"
    assert len(coordinator.resolved) == 1
    request = coordinator.resolved[0]
    assert (request.key.tenant, request.key.agent, request.key.user) == ("default", "hello", "ana")
    assert request.position.latitude == 59.9
    assert [message for _, message in north.turns] == ["hi", "again"]
    assert len({turn_id for turn_id, _ in north.turns}) == 2


async def test_a_stream_yields_deltas_and_then_the_reply(mesh: FakeMesh) -> None:
    _, _, coordinator = await two_nodes(mesh)
    async with AsyncClient([coordinator.address]) as client, client.attach("hello", "ana") as chat:
        events = [event async for event in chat.stream("hello")]
    assert events[:2] == [Delta("HE"), Delta("LLO")]
    assert isinstance(events[2], Reply)
    assert events[2].text == "HELLO"


async def test_a_node_that_dies_mid_stream_is_left_with_the_same_turn_id(mesh: FakeMesh) -> None:
    north, south, coordinator = await two_nodes(mesh)
    north.script.append(dying)
    async with AsyncClient([coordinator.address]) as client, client.attach("hello", "ana") as chat:
        events = [event async for event in chat.stream("hello")]
    assert events[:2] == [Delta("half a rep"), Restarted()]
    assert isinstance(events[-1], Reply)
    assert events[-1].receipt.node == "south"
    assert north.turns == south.turns, "one turn, under one id"
    assert [list(request.exclude) for request in coordinator.resolved] == [[], ["north"]]


async def test_a_node_that_died_while_the_chat_was_idle_is_left(mesh: FakeMesh) -> None:
    north, _, coordinator = await two_nodes(mesh)
    async with AsyncClient([coordinator.address]) as client, client.attach("hello", "ana") as chat:
        await chat.send("hi")
        await north.stop()
        assert (await chat.send("again")).receipt.node == "south"


@pytest.mark.parametrize("reason", [Reason.NODE_FULL, Reason.NODE_STOPPING, Reason.NODE_SUSPENDED])
async def test_a_node_that_refuses_is_excluded(mesh: FakeMesh, reason: Reason) -> None:
    north, _, coordinator = await two_nodes(mesh)
    north.refusals.append(refusal(reason))
    async with AsyncClient([coordinator.address]) as client, client.attach("hello", "ana") as chat:
        assert (await chat.send("hi")).receipt.node == "south"
    assert list(coordinator.resolved[1].exclude) == ["north"]
    assert not north.turns


async def test_an_expired_ticket_is_renewed_for_the_same_node(mesh: FakeMesh) -> None:
    north, _, coordinator = await two_nodes(mesh)
    north.refusals.append(refusal(Reason.TICKET_EXPIRED))
    async with AsyncClient([coordinator.address]) as client, client.attach("hello", "ana") as chat:
        assert (await chat.send("hi")).receipt.node == "north"
    assert north.tickets == [b"ticket 1", b"ticket 2"]


async def test_a_turn_that_could_not_be_committed_is_sent_again(mesh: FakeMesh) -> None:
    north, _, coordinator = await two_nodes(mesh)
    north.script.append(failing(refusal(Reason.TURN_NOT_COMMITTED)))
    async with AsyncClient([coordinator.address]) as client, client.attach("hello", "ana") as chat:
        await chat.send("hi")
    assert len(north.turns) == 2
    assert len(set(north.turns)) == 1


async def test_an_owner_that_is_unreachable_is_waited_for(mesh: FakeMesh) -> None:
    _, south, coordinator = await two_nodes(mesh)
    gone = FakeNode("gone")
    await gone.start()
    await gone.stop()
    coordinator.nodes = [gone]  # offered again and again, until it counts as lost
    async with AsyncClient([coordinator.address]) as client, client.attach("hello", "ana") as chat:
        sending = asyncio.create_task(chat.send("hi"))
        await eventually(lambda: len(coordinator.resolved) >= 4, 10, "it is asked again and again")
        coordinator.refusals.append(refusal(Reason.NODE_UNREACHABLE))
        coordinator.nodes = [south]
        assert (await sending).receipt.node == "south"


async def test_a_coordinator_that_is_down_is_waited_for(mesh: FakeMesh) -> None:
    north, _, first = await two_nodes(mesh)
    address = first.address
    await first.stop()
    async with AsyncClient([address]) as client, client.attach("hello", "ana") as chat:
        sending = asyncio.create_task(chat.send("hi"))
        await asyncio.sleep(0.3)
        await mesh.add(FakeCoordinator(north), listen=address)
        assert (await sending).text == "HI"


async def test_another_coordinator_answers_for_one_that_is_down(mesh: FakeMesh) -> None:
    north, _, up = await two_nodes(mesh)
    down, cut_off = FakeCoordinator(north), FakeCoordinator(north)
    await mesh.add(down, cut_off)
    await down.stop()
    cut_off.refusals.append(refusal(Reason.STORE_UNAVAILABLE))
    async with AsyncClient([down.address, cut_off.address, up.address]) as client:
        async with client.attach("hello", "ana") as chat:
            await chat.send("hi")
        async with client.attach("hello", "ben") as chat:
            await chat.send("hi")
    assert len(up.resolved) == 2, "the one that answered is asked first from then on"
    assert len(cut_off.resolved) == 1


async def test_without_any_coordinator_the_deadline_ends_the_turn_with_a_hint(mesh: FakeMesh) -> None:
    _, _, coordinator = await two_nodes(mesh)
    await coordinator.stop()
    async with AsyncClient([coordinator.address]) as client, client.attach("hello", "ana") as chat:
        with pytest.raises(RoostError) as caught:
            await chat.send("hi", turn_id="t1", timeout=0.4)
    assert caught.value.reason is Reason.COORDINATOR_UNREACHABLE
    assert "no reply within 0.4 s" in caught.value.message
    assert "roost up" in caught.value.hint
    assert "turn id t1" in caught.value.hint


async def test_a_node_that_never_answers_ends_at_the_deadline(mesh: FakeMesh) -> None:
    north, _, coordinator = await two_nodes(mesh)
    north.script.append(silent)
    async with AsyncClient([coordinator.address]) as client, client.attach("hello", "ana") as chat:
        with pytest.raises(RoostError) as caught:
            await chat.send("hi", timeout=0.3)
        assert caught.value.reason is Reason.DEADLINE
        assert (await chat.send("again")).text == "AGAIN", "the chat can be used again"


async def test_a_failed_turn_raises_and_the_chat_goes_on_over_the_same_stream(mesh: FakeMesh) -> None:
    north, _, coordinator = await two_nodes(mesh)
    north.script.append(failing(RoostError(Reason.TURN_FAILED, "the agent failed: ValueError: x", "look")))
    async with AsyncClient([coordinator.address]) as client, client.attach("hello", "ana") as chat:
        with pytest.raises(RoostError) as caught:
            await chat.send("hi")
        assert (caught.value.reason, caught.value.hint) == (Reason.TURN_FAILED, "look")
        await chat.send("again")
    assert len(north.tickets) == 1


async def test_leaving_a_stream_early_does_not_mix_up_replies(mesh: FakeMesh) -> None:
    _, _, coordinator = await two_nodes(mesh)
    async with AsyncClient([coordinator.address]) as client, client.attach("hello", "ana") as chat:
        stream = chat.stream("first")
        assert await anext(stream) == Delta("FI")
        await stream.aclose()
        assert (await chat.send("second")).text == "SECOND"


async def test_a_cancelled_turn_leaves_a_chat_that_works(mesh: FakeMesh) -> None:
    north, _, coordinator = await two_nodes(mesh)
    north.script.append(silent)
    async with AsyncClient([coordinator.address]) as client, client.attach("hello", "ana") as chat:
        sending = asyncio.create_task(chat.send("hi"))
        await eventually(lambda: north.turns, 10, "the turn has arrived")
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        assert (await chat.send("again")).text == "AGAIN"


async def test_a_turn_is_cancelled_when_the_user_says_so(mesh: FakeMesh) -> None:
    north, _, coordinator = await two_nodes(mesh)
    north.script.append(cancellable)
    async with AsyncClient([coordinator.address]) as client, client.attach("hello", "ana") as chat:
        chat.cancel()  # nothing is under way
        stream = chat.stream("hi", turn_id="t1")
        assert await anext(stream) == Delta("so far")
        chat.cancel()
        chat.cancel()
        with pytest.raises(RoostError) as caught:
            await anext(stream)
        assert caught.value.reason is Reason.TURN_CANCELLED
        assert north.cancels == ["t1"]
        assert (await chat.send("again")).text == "AGAIN"
    assert len(north.tickets) == 1, "over the same stream"


async def test_a_turn_that_is_cancelled_before_it_was_sent_is_not(mesh: FakeMesh) -> None:
    north, _, coordinator = await two_nodes(mesh)
    async with AsyncClient([coordinator.address]) as client, client.attach("hello", "ana") as chat:
        sending = asyncio.create_task(chat.send("hi"))
        await asyncio.sleep(0)
        chat.cancel()
        with pytest.raises(RoostError) as caught:
            await sending
    assert caught.value.reason is Reason.TURN_CANCELLED
    assert not north.turns


async def test_a_cancellation_follows_its_turn_to_another_node(mesh: FakeMesh) -> None:
    north, south, coordinator = await two_nodes(mesh)
    north.script.append(dying)
    south.script.append(cancellable)
    async with AsyncClient([coordinator.address]) as client, client.attach("hello", "ana") as chat:
        stream = chat.stream("hi", turn_id="t1")
        assert [await anext(stream), await anext(stream)] == [Delta("half a rep"), Restarted()]
        chat.cancel()
        assert await anext(stream) == Delta("so far")
        with pytest.raises(RoostError) as caught:
            await anext(stream)
    assert caught.value.reason is Reason.TURN_CANCELLED
    assert (len(south.turns), south.cancels) == (1, ["t1"])


@pytest.mark.parametrize("how", ["task", "break"])
@pytest.mark.parametrize("cancel", [True, False])
async def test_a_turn_that_is_left_is_cancelled_if_the_user_wants_that(
    mesh: FakeMesh, how: str, cancel: bool
) -> None:
    north, _, coordinator = await two_nodes(mesh)
    north.script.append(cancellable)
    async with AsyncClient([coordinator.address]) as client, client.attach("hello", "ana") as chat:
        if how == "task":
            sending = asyncio.create_task(chat.send("hi", cancel_if_left=cancel))
            await eventually(lambda: north.turns, 10, "the turn has arrived")
            sending.cancel()
            with pytest.raises(asyncio.CancelledError):
                await sending
        else:
            stream = chat.stream("hi", cancel_if_left=cancel)
            await anext(stream)
            await stream.aclose()
        assert len(north.cancels) == cancel
        assert (await chat.send("again")).text == "AGAIN"


async def test_a_turn_says_how_long_it_may_take_and_what_was_last_given(mesh: FakeMesh) -> None:
    north, _, coordinator = await two_nodes(mesh)
    async with AsyncClient([coordinator.address]) as client, client.attach("hello", "ana") as chat:
        first = await chat.send("one", timeout=20.0)
        await chat.send("two", timeout=0.9)
    one, two = north.sent
    assert 10_000 < one.deadline_ms < 20_000
    assert 0 < two.deadline_ms < 900
    assert not one.HasField("given")
    given = two.given
    assert (given.turn_id, given.node, given.version, given.durable) == (first.turn_id, "north", 1, True)


async def test_what_cannot_be_sent_is_refused_before_any_call(mesh: FakeMesh) -> None:
    _, _, coordinator = await two_nodes(mesh)
    async with AsyncClient([coordinator.address]) as client, client.attach("hello", "ana") as chat:
        for message, reason in (
            ("ä" * (MAX_TURN_BYTES // 2 + 1), Reason.MESSAGE_TOO_LARGE),
            ("\ud800", Reason.BAD_REQUEST),
        ):
            with pytest.raises(RoostError) as caught:
                await chat.send(message)
            assert caught.value.reason is reason
        await chat.send("x" * MAX_TURN_BYTES)
        with pytest.raises(RoostError):
            client.attach("hello", "no/slash")
    assert len(coordinator.resolved) == 1


async def test_the_sync_client_is_the_async_one(mesh: FakeMesh) -> None:
    north, south, coordinator = await two_nodes(mesh)
    north.script.append(dying)

    def use() -> list[object]:
        with Client([coordinator.address]) as client, client.attach("hello", "ana") as chat:
            events: list[object] = list(chat.stream("hello"))
            events.append(chat.send("again"))
            stream = chat.stream("left early")
            next(stream)
            stream.close()
            events.append(chat.send("last"))
            return events

    events = await asyncio.to_thread(use)
    assert events[:2] == [Delta("half a rep"), Restarted()]
    assert [event.text for event in events if isinstance(event, Reply)] == ["HELLO", "AGAIN", "LAST"]
    assert north.turns[0] == south.turns[0]


async def test_the_sync_client_cancels_from_another_thread_and_when_it_is_left(mesh: FakeMesh) -> None:
    north, _, coordinator = await two_nodes(mesh)
    north.script.extend([cancellable, cancellable])

    def use() -> Reason:
        with Client([coordinator.address]) as client, client.attach("hello", "ana") as chat:
            stream = chat.stream("one")
            next(stream)
            chat.cancel()
            with pytest.raises(RoostError) as caught:
                next(stream)
            stream = chat.stream("two", cancel_if_left=True)
            next(stream)
            stream.close()
            assert chat.send("three").text == "THREE"
            return caught.value.reason

    assert await asyncio.to_thread(use) is Reason.TURN_CANCELLED
    assert len(north.cancels) == 2
