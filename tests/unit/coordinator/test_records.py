from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.records import (
    AgentRecord,
    CoordinatorRecord,
    InstanceRecord,
    NodeInfo,
    NodeRecord,
    NodeState,
    Phase,
    Position,
    Role,
    Stored,
    agent_key,
    coordinator_key,
    decode_signing_key,
    encode_signing_key,
    instance_key,
    node_key,
)
from coordinator.store.base import Record
from shared.errors import Reason, RoostError
from shared.identity import InstanceKey
from shared.resources import Resources, devices_of
from tests.unit.coordinator.support import info, instance

names = st.from_regex(r"[a-z0-9][a-z0-9-]{0,20}", fullmatch=True)
users = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,20}", fullmatch=True)
counts = st.integers(0, 2**63)
infos = st.builds(
    NodeInfo,
    id=names,
    role=st.sampled_from(Role),
    site=names,
    address=st.just("host:1"),
    position=st.none() | st.builds(Position, st.floats(-90, 90), st.floats(-180, 180)),
    capacity=st.builds(
        Resources,
        counts,
        st.integers(0, 2**31),
        st.integers(0, 2**31),
        st.dictionaries(names, st.integers(1, 9), max_size=3).map(devices_of),
    ),
    started_id=st.text(min_size=1, max_size=10),
)


@given(
    st.builds(
        InstanceRecord,
        key=st.builds(InstanceKey, names, names, users),
        epoch=counts,
        node=names,
        version=counts,
        root=st.text(),
        last_turn=st.text(),
        phase=st.sampled_from(Phase),
        why=st.text(),
        agent_version=st.text(),
        placed_at_unix=st.floats(0, 1e10),
        size=st.none() | st.builds(Resources, st.integers(1, 2**40), st.integers(1, 9), st.integers(1, 9)),
    )
)
def test_instances_come_back_as_they_were(record: InstanceRecord) -> None:
    assert InstanceRecord.decode(Record(instance_key(record.key), record.encode(), 7)) == Stored(record, 7)


@given(st.builds(NodeRecord, infos, names, st.sampled_from(NodeState), st.booleans()))
def test_nodes_come_back_as_they_were(record: NodeRecord) -> None:
    assert NodeRecord.decode(Record(node_key(record.info.id), record.encode(), 7)) == Stored(record, 7)


@given(infos)
def test_a_nodes_own_words_come_back_as_they_were(told: NodeInfo) -> None:
    assert NodeInfo.from_proto(told.to_proto()) == told


def test_agents_coordinators_and_the_key_come_back_as_they_were() -> None:
    agent = AgentRecord("acme", "chef", "v1", '[agent]\nname = "chef"\n[run]\nentry = "a:b"\n', "ab" * 32)
    assert AgentRecord.decode(Record(agent_key("acme", "chef"), agent.encode(), 3)) == Stored(agent, 3)
    coordinator = CoordinatorRecord("c1", "host:1")
    assert (
        CoordinatorRecord.decode(Record(coordinator_key("c1"), coordinator.encode(), 3)).value == coordinator
    )
    assert decode_signing_key(Record("signing-key", encode_signing_key(b"\x00" * 32), 1)) == b"\x00" * 32


@pytest.mark.parametrize("value", [b"", b"{", b"[]", b"7", b"{}", b'{"epoch": 1}', b"\xff"])
def test_what_cannot_be_read_names_its_key(value: bytes) -> None:
    for decode, name in (
        (InstanceRecord.decode, "instances/acme/chef/ana"),
        (NodeRecord.decode, "nodes/a"),
        (AgentRecord.decode, "agents/acme/chef"),
        (CoordinatorRecord.decode, "coordinators/c"),
    ):
        with pytest.raises(RoostError) as caught:
            decode(Record(name, value, 1))
        assert caught.value.reason is Reason.INTERNAL
        assert name in caught.value.message


def test_fields_that_a_newer_version_added_are_ignored() -> None:
    value = json.loads(instance().encode()) | {"added_later": [1, 2]}
    record = Record(instance_key(instance().key), json.dumps(value).encode(), 1)
    assert InstanceRecord.decode(record).value == instance()


def test_an_agent_whose_policy_cannot_be_read_is_no_agent() -> None:
    record = AgentRecord("acme", "chef", "v1", "nonsense", "ab" * 32)
    with pytest.raises(RoostError) as caught:
        AgentRecord.decode(Record(agent_key("acme", "chef"), record.encode(), 1))
    assert caught.value.reason is Reason.INTERNAL


def test_no_such_place() -> None:
    for latitude, longitude in ((91, 0), (0, 181), (float("nan"), 0)):
        with pytest.raises(ValueError, match="no position"):
            Position(latitude, longitude)
    assert info("a").position == Position(1.5, -2.5)


def test_an_instance_of_before_there_were_sizes_has_none() -> None:
    old = json.loads(instance().encode())
    del old["size"]
    record = Record(instance_key(instance().key), json.dumps(old).encode(), 1)
    assert InstanceRecord.decode(record).value == instance()
