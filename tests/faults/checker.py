"""Judges a history against promises 1 to 4. Pure: a history in, a list of violations out.

The rules, for each user (one instance); "before" is real time: a was acknowledged before b was first sent.

  unreadable   after the faults, everything can be read again
  lost         an acknowledged number is in the final list
  doubled      no number is in a list twice
  invented     what is in the final list was sent, and nobody was told that it had failed
  forked       every reply shows a beginning of the final list: there is one past, not two
  order        what was acknowledged before, comes before; a client's own numbers so keep their order
  stale        a reply shows what was acknowledged before the turn was first sent
  torn         the agent's state and its SQLite file say the same
  versions     each turn makes one version, of its own, on top of the one it says it built on; versions and
               epochs never go back from what was acknowledged before; later versions show longer lists
  owners       one node in an epoch
  resent       a turn that is sent again gets the same reply, and only one of its replies is not `replayed`
  receipt      "new" is only said of what is new; nothing is said to be lost, for nothing was destroyed
  store        what etcd held follows the rules of epochs and versions, and each acknowledged turn is the very
               one by which its version came there, from the node and in the epoch that its receipt names
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from tests.faults.history import Held, History, Op, Told


@dataclass(frozen=True, slots=True)
class Violation:
    rule: str
    user: str
    what: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.user}: {self.what}"


@dataclass(frozen=True, slots=True)
class Answered:
    """An `ok` operation with its parts at hand. `first` is when its turn was first sent by anybody."""

    op: Op
    told: Told
    numbers: list[int]
    sqlite: list[int]
    first: float

    def __str__(self) -> str:
        what = "read" if self.op.number is None else f"append {self.op.number}"
        return f"{what} ({self.op.client}, {self.told.node}, {self.told.epoch}.{self.told.version})"


Said = Iterator[tuple[str, str]]


def check(history: History) -> list[Violation]:
    violations = []
    for user in history.users():
        ops = [op for op in history.ops if op.user == user]
        held = sorted((h for h in history.held if h.user == user), key=lambda h: h.revision)
        final = history.final.get(user)
        violations += [Violation(rule, user, what) for rule, what in _user(ops, held, final)]
    return violations


def _user(ops: Sequence[Op], held: Sequence[Held], final: list[int] | None) -> Said:
    answered = _answered(ops)
    if final is None:
        yield "unreadable", "it could not be read when all faults were over"
    else:
        yield from _final(ops, answered, final)
    yield from _replies(answered)
    yield from _real_time(answered)
    yield from _versions(answered)
    yield from _owners(answered)
    yield from _resent(answered)
    yield from _store(answered, held)


def _answered(ops: Sequence[Op]) -> list[Answered]:
    first: dict[str, float] = {}
    for op in ops:
        first[op.turn] = min(op.invoked, first.get(op.turn, op.invoked))
    return [
        Answered(op, op.receipt, *op.lists(), first[op.turn])
        for op in ops
        if op.outcome == "ok" and op.receipt is not None
    ]


def _final(ops: Sequence[Op], answered: Sequence[Answered], final: list[int]) -> Said:
    there = set(final)
    for a in answered:
        if a.op.number is not None and a.op.number not in there:
            yield "lost", f"{a} was acknowledged and is gone"
        if a.numbers != final[: len(a.numbers)]:
            yield "forked", f"{a} showed {_around(a.numbers, final)}"
    place = {number: i for i, number in enumerate(final)}
    there_still = [a for a in answered if a.op.number in there]
    for a, before in _with_before(there_still, lambda a: a.first, lambda a: place[a.op.number or 0]):
        if before is not None and place[a.op.number or 0] < place[before.op.number or 0]:
            yield "order", f"{a} is before {before} in the final list, and was sent after it was acknowledged"
    yield from (("doubled", f"{n} is in the final list twice") for n in _twice(final))
    sent = {op.number for op in ops}
    yield from (("invented", f"nobody sent {n}") for n in final if n not in sent)
    unsure = {op.number for op in ops if op.outcome != "fail"}
    refused = {op.number for op in ops if op.outcome == "fail"} - unsure
    yield from (
        ("invented", f"{n} is there, and its client was told that it failed") for n in there & refused
    )


def _replies(answered: Sequence[Answered]) -> Said:
    for a in answered:
        yield from (("doubled", f"{a} showed {n} twice") for n in _twice(a.numbers))
        if a.numbers != a.sqlite:
            yield "torn", f"{a} found {a.numbers[-5:]} in its state and {a.sqlite[-5:]} in SQLite"
        if a.op.number is not None and a.numbers[-1:] != [a.op.number]:
            yield "order", f"{a} did not come last in its own reply: {a.numbers[-5:]}"


def _real_time(answered: Sequence[Answered]) -> Said:
    """What was acknowledged before shows, and comes before."""
    for a, before in _with_before(answered, lambda a: a.first, len_of_numbers):
        if before is not None and len(a.numbers) < len(before.numbers):
            yield "stale", f"{a} does not show {before}, which was acknowledged before it was sent"
        if before is not None and a.op.number in before.numbers:
            yield "order", f"{a} is in the reply to {before}, which was acknowledged before it was sent"
    for key, name in ((version_of, "version"), (epoch_of, "epoch")):
        for a, before in _with_before(answered, lambda a: a.op.invoked, key):
            if before is not None and key(a) < key(before):
                yield "versions", f"the {name} of {a} is behind that of {before}, acknowledged before"


def _versions(answered: Sequence[Answered]) -> Said:
    made = sorted((a for a in answered if not a.told.replayed), key=version_of)
    for a in made:
        if a.told.version != a.told.resumed_version + 1:
            yield "versions", f"{a} says that it built on version {a.told.resumed_version}"
        if a.told.resumed_from == "new" and (a.told.resumed_version or len(a.numbers) > 1):
            yield "receipt", f"{a} says that it is new"
        if a.told.version == 1 and a.told.resumed_from not in ("new", "live"):
            yield "receipt", f"{a} is the first version, and was resumed from {a.told.resumed_from}"
    for a in answered:
        if a.told.lost:
            yield "receipt", f"{a} says that it lost {', '.join(a.told.lost)}"
    for one, two in pairwise(made):
        if one.told.version == two.told.version and one.op.turn != two.op.turn:
            yield "versions", f"{one} and {two} made the same version"
        if one.told.epoch > two.told.epoch:
            yield "versions", f"{two} came after {one} in an earlier epoch"
        appended = two.op.number is not None and one.told.version < two.told.version
        if len(two.numbers) < len(one.numbers) + appended:
            yield "versions", f"{two} shows {len(two.numbers)} numbers, after {len(one.numbers)} of {one}"


def _owners(answered: Sequence[Answered]) -> Said:
    nodes: defaultdict[int, set[str]] = defaultdict(set)
    for a in answered:
        nodes[a.told.epoch].add(a.told.node)
    for epoch, owners in sorted(nodes.items()):
        if len(owners) > 1:
            yield "owners", f"{' and '.join(sorted(owners))} both answered in epoch {epoch}"


def _resent(answered: Sequence[Answered]) -> Said:
    turns: defaultdict[str, list[Answered]] = defaultdict(list)
    for a in answered:
        turns[a.op.turn].append(a)
    for turn, same in turns.items():
        if len({a.op.reply for a in same}) > 1:
            yield "resent", f"turn {turn} got different replies: {', '.join(map(str, same))}"
        if sum(not a.told.replayed for a in same) > 1:
            yield "resent", f"turn {turn} was run twice: {', '.join(map(str, same))}"


def _store(answered: Sequence[Answered], held: Sequence[Held]) -> Said:
    if not held:
        return
    for old, new in pairwise(held):
        if new.epoch == old.epoch:
            same = (new.version, new.root) == (old.version, old.root)
            holds = new.node == old.node and (same or new.version == old.version + 1)
        else:
            holds = new.epoch == old.epoch + 1 and (new.version, new.root) == (old.version, old.root)
        if not holds:
            yield "store", f"{_shown(old)} became {_shown(new)}"
    came: dict[int, Held] = {}
    for h in held:
        came.setdefault(h.version, h)
    for a in answered:
        h = came.get(a.told.version)
        if h is None:
            yield "store", f"{a} was acknowledged, and etcd never held its version"
        elif not a.told.replayed and (
            (h.node, h.epoch, h.last_turn) != (a.told.node, a.told.epoch, a.op.turn)
        ):
            yield "store", f"{a} of turn {a.op.turn} was acknowledged, but that version was {_shown(h)}"


# --- helpers ---------------------------------------------------------------------------------------


def len_of_numbers(a: Answered) -> int:
    return len(a.numbers)


def version_of(a: Answered) -> int:
    return a.told.version


def epoch_of(a: Answered) -> int:
    return a.told.epoch


def _with_before(
    answered: Sequence[Answered], sent: Callable[[Answered], float], key: Callable[[Answered], int]
) -> Iterator[tuple[Answered, Answered | None]]:
    """Each, with the one of greatest `key` that was acknowledged before this one was sent."""
    by_end = sorted(answered, key=lambda a: a.op.ended)
    greatest: Answered | None = None
    at = 0
    for a in sorted(answered, key=sent):
        while at < len(by_end) and by_end[at].op.ended < sent(a):
            if greatest is None or key(by_end[at]) > key(greatest):
                greatest = by_end[at]
            at += 1
        yield a, greatest


def _twice(numbers: Sequence[int]) -> list[int]:
    seen: set[int] = set()
    return [n for n in numbers if n in seen or seen.add(n)]  # type: ignore[func-returns-value]


def _around(numbers: list[int], final: list[int]) -> str:
    at = next((i for i, (a, b) in enumerate(zip(numbers, final, strict=False)) if a != b), len(final))
    return (
        f"...{numbers[max(0, at - 2) : at + 3]} where the final list has ...{final[max(0, at - 2) : at + 3]}"
    )


def _shown(held: Held) -> str:
    return f"(epoch {held.epoch}, {held.node}, version {held.version}, turn {held.last_turn})"
