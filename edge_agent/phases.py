"""What an instance may be in, what a turn of it gives, and what it works with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from edge_agent.commits import Commits
from edge_agent.control import Agent, ControlPlane
from edge_agent.jail.api import Jail, Jails
from edge_agent.records import Records
from edge_agent.reservations import Reservations
from edge_agent.starts import Starts
from edge_agent.state.index import Index
from edge_agent.state.store import StateStore
from edge_agent.tenure import Tenure
from protos.v1 import common_pb2
from shared.manifest import StateManifest


@dataclass(frozen=True, slots=True)
class Asleep:
    """No process. `told`: the coordinator knows, and counts its room as free."""

    told: bool


@dataclass(frozen=True, slots=True)
class Live:
    """Its process runs, and its files are what `manifest` says (between turns)."""

    jail: Jail
    agent: Agent
    manifest: StateManifest
    index: Index | None
    resumed_from: common_pb2.ResumedFrom.ValueType


@dataclass(frozen=True, slots=True)
class Lost:
    """Another node may own it."""

    why: str


State = Asleep | Live | Lost


@dataclass(frozen=True, slots=True)
class Done:
    """A committed turn."""

    reply: str
    receipt: common_pb2.Receipt


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
