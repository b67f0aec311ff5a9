"""Which faults, in which order, drawn from a seed. Pure: the same seed gives the same plan on any machine."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from tests.support import failpoints

USERS = ("ana", "ben", "cy")
SLEEPY = "cy"  # often silent for so long that the instance hibernates
COORDINATORS = ("c0", "c1")
NODES = ("e0", "e1", "cloud")
ETCDS = ("etcd0", "etcd1", "etcd2")
REASONS = {"c": "STORE_UNAVAILABLE", "n": "NODE_FAILED"}  # what a failpoint raises, by where it is

# How often, of all. Failpoints are most of it: they meet the steps that matter.
WEIGHTS = {
    "failpoint": 40,
    "kill": 9,  # the whole node, or the coordinator; it is started again
    "freeze": 9,  # SIGSTOP, SIGCONT
    "kill-daemon": 5,  # of a node; its jailer starts it again
    "cut": 7,  # all wires of one part: reset, then refused
    "stall": 7,  # nothing comes through, and nobody is told
    "cut-wire": 6,  # one wire
    "etcd-kill": 4,
    "etcd-freeze": 4,
    "take-over": 5,  # the owner stands still between its last look at the clock and its commit
    "blobs-vanish": 2,
    "blobs-corrupt": 2,
    "collect": 5,  # a round of collecting in the blob store: no fault, but it must not become one
    "clock": 4,  # the wall clock of a daemon jumps
}


@dataclass(frozen=True, slots=True)
class Fault:
    """`seconds` that it lasts, `pause` before the next begins. `detail`: a failpoint and its action, or a
    wire's other end, or how far a clock jumps. A `target` that is a user means their instance's owner."""

    number: int
    kind: str
    target: str
    seconds: float
    pause: float
    detail: str = ""

    def __str__(self) -> str:
        return " ".join(filter(None, (self.kind, self.target, self.detail, f"for {self.seconds:.1f} s")))


def draw(seed: int, ttl: float) -> Iterator[Fault]:
    """Without end."""
    dice = random.Random(seed)
    kinds, weights = list(WEIGHTS), list(WEIGHTS.values())
    deck: list[str] = []  # of failpoints: each comes once before any comes again
    number = 0
    while True:
        number += 1
        kind = dice.choices(kinds, weights)[0]
        if kind == "failpoint":
            deck = deck or dice.sample(failpoints.ALL, len(failpoints.ALL))
            target, detail = _aim_at_point(dice, deck.pop())
        else:
            target, detail = _aim(dice, kind)
        # As often shorter as longer than what the mesh tolerates in silence.
        seconds = dice.uniform(0.1, ttl * 2)
        yield Fault(number, kind, target, round(seconds, 2), round(dice.uniform(0.0, 0.8), 2), detail)


def _aim_at_point(dice: random.Random, name: str) -> tuple[str, str]:
    if name not in failpoints.NODE:
        target = dice.choice(COORDINATORS)
    elif name.startswith(("node.start", "node.sleep")):
        target = SLEEPY
    else:
        target = dice.choice(USERS)
    return target, f"{name} {_action(dice, name)}"


def _aim(dice: random.Random, kind: str) -> tuple[str, str]:
    match kind:
        case "kill" | "freeze" | "cut" | "stall":
            return dice.choice((*NODES, *NODES, *COORDINATORS)), ""
        case "kill-daemon":
            return dice.choice(NODES), ""
        case "cut-wire":
            return dice.choice(
                [
                    *(("client", n) for n in (*NODES, *COORDINATORS)),
                    *((n, c) for n in NODES for c in COORDINATORS),
                    *((c, e) for c in COORDINATORS for e in ETCDS),
                ]
            )
        case "etcd-kill" | "etcd-freeze":
            return dice.choice(ETCDS), ""
        case "take-over":
            return dice.choice(USERS), ""
        case "collect":
            return dice.choice(COORDINATORS), ""
        case "clock":
            return dice.choice((*NODES, *COORDINATORS)), dice.choice(("+90", "-90", "+86400", "-86400"))
        case _:
            return "blobs", ""


def _action(dice: random.Random, name: str) -> str:
    match dice.choice(("kill", "kill", "stop", "stop", "sleep", "raise")):
        case "sleep":
            return f"sleep {dice.uniform(0.05, 1.5):.2f}"
        case "raise":
            return f"raise {REASONS[name[0]]}"
        case action:
            return action
