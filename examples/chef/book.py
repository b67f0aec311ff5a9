"""The recipe book: what each dish needs besides oil, salt and spices, and what each diet leaves out.

The data is in recipes.json. Foods have their singular names in it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from quantities import Amount, parse_amount


@dataclass(frozen=True)
class Recipe:
    name: str
    minutes: int
    needs: dict[str, Amount]
    how: str


_DATA = json.loads((Path(__file__).parent / "recipes.json").read_text(encoding="utf-8"))

DIETS = {diet: frozenset(traits) for diet, traits in _DATA["diets"].items()}
TRAITS = {trait: frozenset(members) for trait, members in _DATA["traits"].items()}
RECIPES = tuple(
    Recipe(
        each["name"],
        each["minutes"],
        {ingredient: parse_amount(amount) for ingredient, amount in each["needs"].items()},
        each["how"],
    )
    for each in _DATA["recipes"]
)


def traits_of(ingredient: str) -> set[str]:
    """What an ingredient is or contains: "ham" is meat and pork."""
    return {trait for trait, members in TRAITS.items() if ingredient in members}


def some(food: str) -> str:
    """The food as one speaks of it without a number: "tomatoes", but "rice"."""
    plural: str = _DATA["plurals"].get(food, food)
    return plural


def named(food: str, amount: Amount) -> str:
    """ "3 eggs", "1 onion", "200 g rice"."""
    return f"{amount} {food if amount == Amount(1) else some(food)}"


def find(words: str) -> Recipe | None:
    """The recipe that `words` mean: "dal" is the red lentil dal, if no other is closer."""
    wanted = set(words.lower().replace("-", " ").split()) - {"with", "and", "the"}
    best: tuple[float, float] = (0.0, 0.0)
    found = None
    for recipe in RECIPES:
        name = set(recipe.name.replace("-", " ").split()) - {"with", "and", "e"}
        common = len(name & wanted)
        closeness = (common / max(1, len(wanted)), common / len(name))
        if closeness[0] >= 0.5 and closeness > best:
            best, found = closeness, recipe
    return found
