"""Amounts of food as people say them: "3", "200 g", "half a litre of", "some"."""

from __future__ import annotations

import re
from dataclasses import dataclass

_UNITS = {
    "g": ("g", 1), "gram": ("g", 1), "kg": ("g", 1000), "kilo": ("g", 1000), "kilogram": ("g", 1000),
    "ml": ("ml", 1), "cl": ("ml", 10), "dl": ("ml", 100),
    "l": ("ml", 1000), "litre": ("ml", 1000), "liter": ("ml", 1000),
    "tin": ("tin", 1), "can": ("tin", 1), "slice": ("slice", 1), "clove": ("clove", 1), "bunch": ("bunch", 1),
    "tbsp": ("tbsp", 1), "tablespoon": ("tbsp", 1), "cup": ("ml", 240), "piece": ("piece", 1),
    "bag": ("bag", 1), "pack": ("bag", 1), "packet": ("bag", 1), "jar": ("jar", 1), "bottle": ("bottle", 1),
}  # fmt: skip
_WORDS = {
    "a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7,
    "eight": 8, "nine": 9, "ten": 10, "dozen": 12, "half": 0.5,
}  # fmt: skip
_FRACTIONS = {"½": 0.5, "¼": 0.25, "¾": 0.75}
_NUMBER = re.compile(r"(\d+)\s*/\s*([1-9]\d*)|(\d+(?:[.,]\d+)?)|([½¼¾])")
_ALWAYS_THE_SAME = {"hummus", "couscous", "asparagus", "molasses", "swiss", "swordfish", "bass"}


@dataclass(frozen=True)
class Amount:
    """`count` of `unit` ("" for pieces that are counted); without a count there is just some."""

    count: float | None = None
    unit: str = ""

    def __str__(self) -> str:
        if self.count is None:
            return "some"
        count, unit = self.count, self.unit
        if unit in ("g", "ml") and count >= 1000:
            count, unit = count / 1000, {"g": "kg", "ml": "l"}[unit]
        if len(unit) > 2 and unit != "tbsp" and count != 1:
            unit += "es" if unit == "bunch" else "s"
        return f"{round(count, 2):g} {unit}".rstrip()

    def plus(self, other: Amount) -> Amount:
        if self.count is None or other.count is None or self.unit != other.unit:
            return other
        return Amount(self.count + other.count, self.unit)

    def minus(self, used: Amount) -> Amount | None:
        """What is left; None for nothing. Of what can't be compared, one use leaves some."""
        if self.count is None or used.count is None or self.unit != used.unit:
            return self
        left = self.count - used.count
        return Amount(left, self.unit) if left > 1e-6 else None

    def covers(self, need: Amount) -> bool:
        if self.count is None or need.count is None or self.unit != need.unit:
            return True
        return self.count >= need.count


def parse_item(text: str) -> tuple[str, Amount] | None:
    """ "200 g of basmati rice" -> ("basmati rice", 200 g). None if no name is left."""
    words = text.lower().strip(" .,!?").split()
    amount, rest = _take_amount(words)
    while rest and rest[0] in ("of", "the", "my", "some", "any", "more", "all", "that", "fresh", "left"):
        rest = rest[1:]
    while rest and rest[-1] in ("left", "again", "anymore", "please", "too", "now", "today", "though"):
        rest = rest[:-1]
    name = singular(" ".join(rest))
    return (name, amount) if name else None


def parse_amount(text: str) -> Amount:
    return _take_amount(text.lower().split())[0]


def singular(name: str) -> str:
    """The form that pantry and recipes use: "cherry tomatoes" -> "cherry tomato"."""
    head, _, last = name.rpartition(" ")
    if last.endswith("ies") and len(last) > 4:
        last = last[:-3] + "y"
    elif last.endswith(("oes", "shes", "ches", "sses", "xes")):
        last = last[:-2]
    elif last.endswith("s") and not last.endswith("ss") and len(last) > 3 and last not in _ALWAYS_THE_SAME:
        last = last[:-1]
    return f"{head} {last}".strip()


def _take_amount(words: list[str]) -> tuple[Amount, list[str]]:
    """The amount that `words` begin with, and the words after it."""
    if not words:
        return Amount(), words
    count, rest = _take_count(words)
    if count is None:
        return Amount(), words
    if rest and singular(rest[0]) in _UNITS:
        unit, factor = _UNITS[singular(rest[0])]
        return Amount(count * factor, unit), rest[1:]
    return Amount(count), rest


def _take_count(words: list[str]) -> tuple[float | None, list[str]]:
    first, rest = words[0], words[1:]
    match = _NUMBER.match(first)
    if match:
        over, under, plain, sign = match.groups()
        count = (
            int(over) / int(under) if over else _FRACTIONS[sign] if sign else float(plain.replace(",", "."))
        )
        glued = first[match.end() :]  # "200g"
        return count, [glued, *rest] if glued else rest
    if first not in _WORDS:
        return None, words
    count = float(_WORDS[first])
    while rest and rest[0] in _WORDS:  # "half a", "a dozen", "two dozen"
        count *= _WORDS[rest[0]]
        rest = rest[1:]
    return count, rest
