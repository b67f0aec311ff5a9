"""What an instance may be in, what a turn of it gives, and what it works with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from edge_agent.commits import Commits
from edge_agent.control import Agent, ControlPlane
from edge_agent.egress.proxy import Egress
from edge_agent.jail.api import Jail, Jails
from edge_agent.packages import Packages
from edge_agent.records import Records
from edge_agent.reservations import Reservations
from edge_agent.starts import Starts
from edge_agent.state.index import Index
from edge_agent.state.store import StateStore
from edge_agent.tasks import Tasks
from edge_agent.tenure import Tenure
from protos.v1 import common_pb2
from shared.identity import InstanceKey
from shared.manifest import StateManifest


def _nobody_copies(key: InstanceKey, version: int, root: str) -> None:
    """A node without peers."""


@dataclass(frozen=True, slots=True)
class Asleep:
    """No process. `told`: the coordinator knows, and counts its room as free."""

    told: bool


@dataclass(frozen=True, slots=True)
class Live:
    """Its process runs, and its files are what `manifest` says (between turns). `resumed_from`: what its next
    receipt says, LIVE once it has committed. `root` is that manifest's."""

    jail: Jail
    agent: Agent
    manifest: StateManifest
    index: Index | None
    resumed_from: common_pb2.ResumedFrom.ValueType
    root: str


@dataclass(frozen=True, slots=True)
class Lost:
    """Another node may own it."""

    why: str


State = Asleep | Live | Lost


@dataclass(frozen=True, slots=True)
class Done:
    """A turn at its end: committed, or about to be, as the receipt says. `built_on`: the state before it, or
    the one in which it was on record."""

    reply: str
    receipt: common_pb2.Receipt
    built_on: StateManifest


@dataclass(frozen=True, slots=True)
class Parts:
    """What an instance works with; the same for all of a node."""

    node: str
    jails: Jails
    state: StateStore
    records: Records
    control: ControlPlane
    commits: Commits
    reservations: Reservations
    tenure: Tenure
    clock: Callable[[], float]
    starts: Starts
    tasks: Tasks
    egress: Egress
    packages: Packages
    offer: Callable[[InstanceKey, int, str], None] = _nobody_copies  # a version, once committed, for copies
