"""A personal chef. It needs no network: what it knows is in /state, what it can cook in recipes.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import planner
import sentences as say
from book import RECIPES, Recipe, find, named, some
from kitchen import Kitchen
from quantities import Amount

from roost import Agent, Turn

agent = Agent()

HELP = (
    "I cook from what you have. Tell me things like: I'm vegetarian. I don't like mushrooms. "
    "I have 3 eggs and 200 g rice. What can I cook? Plan my week. I cooked the omelette. "
    "What do you know about me?"
)


@agent.turn
def chef(turn: Turn) -> Iterator[str]:
    with Kitchen(turn.state_dir / "chef.db") as kitchen:
        answers = [_answer(kitchen, wish) for wish in say.understand(turn.message)] or [HELP]
        yield from _paragraphs(answers)


def _paragraphs(answers: list[str]) -> Iterator[str]:
    for number, answer in enumerate(dict.fromkeys(answers)):
        yield ("\n" if number else "") + answer


def _answer(kitchen: Kitchen, wish: say.Wish) -> str:  # noqa: PLR0912  # one case a wish
    match wish:
        case say.Diet(names, dropped):
            return _diet(kitchen, names, dropped)
        case say.Dislike(foods):
            kitchen.dislike(foods)
            return f"Noted: no {_or(list(map(some, foods)))}."
        case say.Like(foods):
            kitchen.like(foods)
            return f"Good, {_and(list(map(some, foods)))} may be in it."
        case say.Have(items):
            for food, amount in items:
                kitchen.store(food, amount)
            return f"In the pantry: {_stock({food: kitchen.pantry()[food] for food, _ in items})}."
        case say.Used(items):
            return " ".join(_used(kitchen, food, amount) for food, amount in items)
        case say.Cooked(dish):
            return _cooked(kitchen, dish)
        case say.Suggest():
            return _suggest(kitchen)
        case say.Plan(days):
            return _plan(kitchen, days)
        case say.HowTo(dish):
            recipe = find(dish)
            return (
                _recipe(recipe) if recipe else f"I have no recipe for {dish}. I know {len(RECIPES)} others."
            )
        case say.AboutMe():
            return _about(kitchen)
        case say.Forget():
            kitchen.forget_everything()
            return "Forgotten: diet, dislikes, pantry and meals."
        case say.Hello():
            return "Hello! " + HELP
        case say.Unclear(text):
            return f"I did not understand “{text}”. " + HELP
    raise AssertionError(wish)


def _diet(kitchen: Kitchen, names: tuple[str, ...], dropped: bool) -> str:
    if dropped:
        kitchen.drop_diets(names or kitchen.diets())
    else:
        kitchen.keep_diets(names)
    kept = kitchen.diets()
    return f"Noted: you eat {_and(kept)}." if kept else "Noted: no diet, you eat everything."


def _used(kitchen: Kitchen, food: str, amount: Amount) -> str:
    if food not in kitchen.pantry():
        return f"I knew of no {some(food)} in the pantry."
    left = kitchen.use(food, amount)
    return f"No {some(food)} left." if left is None else f"{named(food, left)} left."


def _cooked(kitchen: Kitchen, dish: str) -> str:
    recipe = find(dish)
    if recipe is None:
        return f"I don't know {dish}, so tell me what it took, like: I used 2 eggs."
    kitchen.cooked(recipe.name)
    used = [food for food in recipe.needs if food in kitchen.pantry()]
    for food in used:
        kitchen.use(food, recipe.needs[food])
    taken = f" I took {_and(list(map(some, used)))} off the pantry." if used else ""
    return f"Enjoy the {recipe.name}!{taken}"


def _suggest(kitchen: Kitchen) -> str:
    suggestions = planner.suggest(kitchen.pantry(), _taste(kitchen), kitchen.recent_meals())
    if not suggestions:
        return "Nothing in my book fits your diet and dislikes. Like something again?"
    if not kitchen.pantry():
        names = _and([suggestion.recipe.name for suggestion in suggestions])
        return f"Your pantry is empty as far as I know. You could buy for {names}."
    return "\n".join(_line(suggestion) for suggestion in suggestions)


def _plan(kitchen: Kitchen, days: int) -> str:
    suggestions = planner.plan(kitchen.pantry(), _taste(kitchen), kitchen.recent_meals(), days)
    if not suggestions:
        return "Nothing in my book fits your diet and dislikes. Like something again?"
    lines = [f"Day {day}: {each.recipe.name}" for day, each in enumerate(suggestions, 1)]
    buy = planner.shopping(suggestions)
    lines.append(f"To buy: {_stock(buy)}." if buy else "You have everything.")
    return "\n".join(lines)


def _about(kitchen: Kitchen) -> str:
    pantry, dislikes, meals = kitchen.pantry(), kitchen.dislikes(), kitchen.recent_meals()
    facts = [f"Diet: {_and(kitchen.diets()) or 'everything'}."]
    if dislikes:
        facts.append(f"Dislikes: {_and(list(map(some, dislikes)))}.")
    facts.append(f"Pantry: {_stock(pantry) or 'empty'}.")
    if meals:
        facts.append(f"Cooked lately: {_and(meals)}.")
    return " ".join(facts)


def _recipe(recipe: Recipe) -> str:
    return f"{recipe.name.capitalize()} ({recipe.minutes} minutes): {_stock(recipe.needs)}. {recipe.how}"


def _line(suggestion: planner.Suggestion) -> str:
    recipe = suggestion.recipe
    need = f"you would need {_stock(suggestion.missing)}" if suggestion.missing else "you have everything"
    return f"{recipe.name.capitalize()} ({recipe.minutes} minutes): {need}."


def _taste(kitchen: Kitchen) -> planner.Taste:
    return planner.Taste(tuple(kitchen.diets()), tuple(kitchen.dislikes()))


def _stock(items: Mapping[str, Amount]) -> str:
    return _and([named(food, amount) for food, amount in items.items()])


def _and(words: list[str] | tuple[str, ...]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def _or(words: list[str] | tuple[str, ...]) -> str:
    return " or ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


if __name__ == "__main__":
    agent.run()
