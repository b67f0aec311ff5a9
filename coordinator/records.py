"""What the coordinators keep in the store: frozen values, and JSON for each.

A record's key is not repeated in its value. A value that can't be read is INTERNAL and names its key.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import lru_cache
from typing import Any, Generic, TypeVar

from coordinator.store.base import Record
from protos.v1 import common_pb2
from shared.errors import Reason, RoostError
from shared.identity import InstanceKey
from shared.names import NAME_RULE, is_name
from shared.policy import parse_policy
from shared.resources import Resources, devices_of
from shared.rpc import API_VERSION

INSTANCES, NODES, AGENTS, COORDINATORS = "instances/", "nodes/", "agents/", "coordinators/"
SIGNING_KEY = "signing-key"

T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True, slots=True)
class Stored(Generic[T_co]):
    """A value as it was in the store at `revision`, which a transaction can compare."""

    value: T_co
    revision: int


class Role(StrEnum):
    EDGE = "edge"
    CLOUD = "cloud"


class NodeState(StrEnum):
    UP = "up"
    LOST = "lost"


class Phase(StrEnum):
    PLACED = "placed"  # a node has been chosen and has reserved room
    LIVE = "live"  # its process runs, or is being started
    HIBERNATED = "hibernated"  # no process; its state is committed


@dataclass(frozen=True, slots=True)
class Position:
    """WGS 84, in degrees. ValueError if there is no such place."""

    latitude: float
    longitude: float

    def __post_init__(self) -> None:
        if not (-90 <= self.latitude <= 90 and -180 <= self.longitude <= 180):
            raise ValueError(f"{self.latitude}, {self.longitude} is no position in degrees")


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """What a node says of itself. `started_id` is new at each start of its daemon."""

    id: str
    role: Role
    site: str
    address: str
    position: Position | None
    capacity: Resources
    started_id: str
    platform: str = ""  # what its agents run on, as `shared.wheels` writes it; empty: an older node

    def to_proto(self) -> common_pb2.NodeInfo:
        proto = common_pb2.NodeInfo(
            id=self.id,
            role=common_pb2.CLOUD if self.role is Role.CLOUD else common_pb2.EDGE,
            site=self.site,
            address=self.address,
            capacity=self.capacity.to_proto(),
            api_version=API_VERSION,
            started_id=self.started_id,
            platform=self.platform,
        )
        if self.position is not None:
            proto.position.latitude = self.position.latitude
            proto.position.longitude = self.position.longitude
        return proto

    @classmethod
    def from_proto(cls, proto: common_pb2.NodeInfo) -> NodeInfo:
        """BAD_REQUEST if the node could not be used as it describes itself."""
        if proto.api_version != API_VERSION:
            raise _bad(
                f"node {proto.id} speaks API {proto.api_version!r}, this coordinator {API_VERSION!r}",
                "update whichever of the two is older",
            )
        for what, name in (("node", proto.id), ("site", proto.site)):
            if not is_name(name):
                raise _bad(f"{name!r} is no {what} name", NAME_RULE)
        if proto.role not in (common_pb2.EDGE, common_pb2.CLOUD):
            raise _bad(f"node {proto.id} has no role", "it must be an edge or a cloud node")
        host, _, port = proto.address.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise _bad(f"node {proto.id} gives {proto.address!r} as its address", "write host:port")
        if not proto.started_id:
            raise _bad(f"node {proto.id} gave no started_id", "it must be a new random one at each start")
        if len(proto.platform) > 64:
            raise _bad(f"node {proto.id} says {proto.platform[:64]!r} of its platform", "write less")
        return cls(
            proto.id,
            Role.CLOUD if proto.role == common_pb2.CLOUD else Role.EDGE,
            proto.site,
            proto.address,
            position_of(proto.position) if proto.HasField("position") else None,
            Resources.from_proto(proto.capacity),
            proto.started_id,
            proto.platform,
        )


@dataclass(frozen=True, slots=True)
class InstanceRecord:
    """Who owns an instance, and what is committed of it.

    `version` 0 and an empty `root` mean that nothing is committed yet. `why` and `placed_at_unix` (seconds
    since 1970) are for people; nothing is decided by them. `size` is what somebody chose for this instance;
    None: what its agent's policy says. `parked`: a call of one of its turns that may or may not have been
    made, for people; the journal has the rest. `parent` is the root of the version before, kept here so that
    the past can be found even if the present is damaged; `state_bytes` is what the version's files take
    together. `home` is the edge that it was last on, or where an operator put it: elsewhere it waits to go
    back. Empty: it has been on none yet.
    """

    key: InstanceKey
    epoch: int
    node: str
    version: int
    root: str
    last_turn: str
    phase: Phase
    why: str
    agent_version: str
    placed_at_unix: float
    size: Resources | None = None
    parked: str = ""
    parent: str = ""
    state_bytes: int = 0
    home: str = ""

    def encode(self) -> bytes:
        return _encode(
            epoch=self.epoch,
            node=self.node,
            version=self.version,
            root=self.root,
            last_turn=self.last_turn,
            phase=self.phase.value,
            why=self.why,
            agent_version=self.agent_version,
            placed_at_unix=self.placed_at_unix,
            size=[self.size.memory_bytes, self.size.cpu_millis, self.size.pids] if self.size else None,
            parked=self.parked,
            parent=self.parent,
            state_bytes=self.state_bytes,
            home=self.home,
        )

    @classmethod
    def decode(cls, record: Record) -> Stored[InstanceRecord]:
        return decode(record, _instance)


@dataclass(frozen=True, slots=True)
class NodeRecord:
    """A node, which coordinator vouches that it lives, and whether it may get new instances."""

    info: NodeInfo
    coordinator: str
    state: NodeState
    draining: bool

    def encode(self) -> bytes:
        info = self.info
        position = info.position
        return _encode(
            role=info.role.value,
            site=info.site,
            address=info.address,
            position=[position.latitude, position.longitude] if position else None,
            capacity=[info.capacity.memory_bytes, info.capacity.cpu_millis, info.capacity.pids],
            devices=dict(info.capacity.devices),
            started_id=info.started_id,
            platform=info.platform,
            coordinator=self.coordinator,
            state=self.state.value,
            draining=self.draining,
        )

    @classmethod
    def decode(cls, record: Record) -> Stored[NodeRecord]:
        return decode(record, _node)


@dataclass(frozen=True, slots=True)
class AgentRecord:
    """An agent as it was last deployed."""

    tenant: str
    name: str
    version: str
    policy_toml: str
    bundle_root: str

    @property
    def need(self) -> Resources:
        return _need(self.policy_toml)

    def encode(self) -> bytes:
        return _encode(version=self.version, policy_toml=self.policy_toml, bundle_root=self.bundle_root)

    @classmethod
    def decode(cls, record: Record) -> Stored[AgentRecord]:
        return decode(record, _agent)

    def to_proto(self) -> common_pb2.AgentSpec:
        return common_pb2.AgentSpec(
            tenant=self.tenant,
            name=self.name,
            version=self.version,
            policy_toml=self.policy_toml,
            bundle_root=self.bundle_root,
        )


@dataclass(frozen=True, slots=True)
class CoordinatorRecord:
    """A coordinator that lives: the record is under its lease. `address` is for the other coordinators."""

    id: str
    address: str

    def encode(self) -> bytes:
        return _encode(address=self.address)

    @classmethod
    def decode(cls, record: Record) -> Stored[CoordinatorRecord]:
        return decode(record, lambda name, v: cls(name.removeprefix(COORDINATORS), v["address"]))


def instance_key(key: InstanceKey) -> str:
    return f"{INSTANCES}{key}"


def node_key(node: str) -> str:
    return NODES + node


def agent_key(tenant: str, name: str) -> str:
    return f"{AGENTS}{tenant}/{name}"


def coordinator_key(coordinator: str) -> str:
    return COORDINATORS + coordinator


def position_of(proto: common_pb2.Position) -> Position:
    """BAD_REQUEST if there is no such place."""
    try:
        return Position(proto.latitude, proto.longitude)
    except ValueError as error:
        raise _bad(str(error), "latitude is -90 to 90, longitude -180 to 180") from error


def encode_signing_key(private: bytes) -> bytes:
    return _encode(ed25519=base64.b64encode(private).decode())


def decode_signing_key(record: Record) -> bytes:
    return decode(record, lambda _, v: base64.b64decode(v["ed25519"], validate=True)).value


def _encode(**values: Any) -> bytes:
    return json.dumps(values, separators=(",", ":"), ensure_ascii=False).encode()


_V = TypeVar("_V")


def decode(record: Record, build: Callable[[str, Any], _V]) -> Stored[_V]:
    """What `build` makes of the record's key and JSON. INTERNAL if that is not what it should be."""
    try:
        return Stored(build(record.key, json.loads(record.value)), record.revision)
    except (ValueError, KeyError, TypeError, RoostError, binascii.Error) as error:
        raise unreadable(record, error) from error


def unreadable(record: Record, error: Exception) -> RoostError:
    return RoostError(
        Reason.INTERNAL,
        f"the store's record {record.key} can't be read: {error!r}",
        "was it written by a newer version, or by hand? `etcdctl get` shows it",
    )


def _instance(name: str, v: Any) -> InstanceRecord:
    key = InstanceKey.parse(name.removeprefix(INSTANCES))
    fields = {f: v[f] for f in ("epoch", "node", "version", "root", "last_turn", "why", "agent_version")}
    size = Resources(*v["size"]) if v.get("size") else None
    return InstanceRecord(
        key,
        phase=Phase(v["phase"]),
        placed_at_unix=v["placed_at_unix"],
        size=size,
        parked=v.get("parked", ""),
        parent=v.get("parent", ""),
        state_bytes=v.get("state_bytes", 0),
        home=v.get("home", ""),
        **fields,
    )


def _node(name: str, v: Any) -> NodeRecord:
    info = NodeInfo(
        name.removeprefix(NODES),
        Role(v["role"]),
        v["site"],
        v["address"],
        Position(*v["position"]) if v["position"] is not None else None,
        replace(Resources(*v["capacity"]), devices=devices_of(v.get("devices", {}))),
        v["started_id"],
        v.get("platform", ""),
    )
    return NodeRecord(info, v["coordinator"], NodeState(v["state"]), v["draining"])


def _agent(name: str, v: Any) -> AgentRecord:
    tenant, agent = name.removeprefix(AGENTS).split("/")
    _need(v["policy_toml"])  # one that can't be read is refused here, not whenever it is looked at
    return AgentRecord(tenant, agent, v["version"], v["policy_toml"], v["bundle_root"])


@lru_cache(maxsize=4096)
def _need(policy_toml: str) -> Resources:
    return parse_policy(policy_toml).need


def _bad(message: str, hint: str) -> RoostError:
    return RoostError(Reason.BAD_REQUEST, message, hint)
