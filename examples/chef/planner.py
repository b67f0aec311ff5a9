"""What to cook: pure, from the book and what is known of the user to suggestions."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from book import DIETS, RECIPES, Recipe, traits_of
from quantities import Amount

Pantry = Mapping[str, Amount]


@dataclass(frozen=True)
class Taste:
    diets: tuple[str, ...] = ()
    dislikes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Suggestion:
    """`missing`: what the pantry lacks for it."""

    recipe: Recipe
    missing: dict[str, Amount]


def allowed(recipe: Recipe, taste: Taste) -> bool:
    avoided = {trait for diet in taste.diets for trait in DIETS[diet]}
    return not any(
        traits_of(food) & avoided or any(_is(food, disliked) for disliked in taste.dislikes)
        for food in recipe.needs
    )


def missing(recipe: Recipe, pantry: Pantry) -> dict[str, Amount]:
    lacking = {food: _lacking(need, pantry.get(food)) for food, need in recipe.needs.items()}
    return {food: amount for food, amount in lacking.items() if amount is not None}


def suggest(
    pantry: Pantry, taste: Taste, recent: Collection[str], count: int = 3, recipes: Sequence[Recipe] = RECIPES
) -> list[Suggestion]:
    """The dishes that fit best: little to buy, much used of what is there, and none of the recent ones."""
    fitting = [
        Suggestion(recipe, missing(recipe, pantry))
        for recipe in recipes
        if recipe.name not in recent and allowed(recipe, taste)
    ]
    return sorted(fitting, key=_rank)[:count]


def plan(pantry: Pantry, taste: Taste, recent: Sequence[str], days: int) -> list[Suggestion]:
    """One dish a day, none twice, each with what is left after those before. Shorter if the book ends."""
    left = dict(pantry)
    chosen: list[Suggestion] = []
    for _ in range(days):
        names = [*recent, *(each.recipe.name for each in chosen)]
        best = suggest(left, taste, names, count=1) or suggest(left, taste, names[len(recent) :], count=1)
        if not best:
            break
        chosen += best
        left = after(left, best[0].recipe)
    return chosen


def after(pantry: Pantry, recipe: Recipe) -> dict[str, Amount]:
    """What is left in the pantry when the dish is cooked."""
    left = {food: amount.minus(recipe.needs[food]) if food in recipe.needs else amount
            for food, amount in pantry.items()}  # fmt: skip
    return {food: amount for food, amount in left.items() if amount is not None}


def shopping(suggestions: Sequence[Suggestion]) -> dict[str, Amount]:
    """All that is to be bought for these dishes."""
    total: dict[str, Amount] = {}
    for suggestion in suggestions:
        for food, amount in suggestion.missing.items():
            total[food] = total[food].plus(amount) if food in total else amount
    return dict(sorted(total.items()))


def _rank(suggestion: Suggestion) -> tuple[float, int, int, str]:
    recipe, lacking = suggestion.recipe, len(suggestion.missing)
    return (lacking / len(recipe.needs), lacking - len(recipe.needs), recipe.minutes, recipe.name)


def _lacking(need: Amount, there: Amount | None) -> Amount | None:
    if there is None:
        return need
    return None if there.covers(need) else need.minus(there)


def _is(food: str, disliked: str) -> bool:
    """Is `food` what is disliked? "cheese" is also goat cheese, and "fish" is also cod."""
    return food == disliked or disliked in food.split() or disliked in traits_of(food)
