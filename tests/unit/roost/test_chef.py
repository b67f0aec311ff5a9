"""The chef: what it understands, how it plans, and that it remembers."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import book
import chef
import planner
import pytest
import sentences as say
from planner import Taste
from quantities import Amount, parse_item, singular

from roost import Turn
from roost.cli.deploy import check
from shared.bundle import pack

# --- sentences -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wish"),
    [
        ("I'm vegetarian", say.Diet(("vegetarian",))),
        ("I am vegan and gluten-free!", say.Diet(("vegan", "gluten-free"))),
        ("I’m lactose intolerant.", say.Diet(("dairy-free",))),
        ("I'm not vegetarian anymore", say.Diet(("vegetarian",), dropped=True)),
        ("I eat anything", say.Diet((), dropped=True)),
        ("I don't like mushrooms", say.Dislike(("mushroom",))),
        ("I hate olives, anchovies and goat cheese", say.Dislike(("olive", "anchovy", "goat cheese"))),
        ("we can't stand coriander", say.Dislike(("coriander",))),
        ("I'm allergic to peanuts", say.Dislike(("peanut",))),
        ("I like mushrooms again", say.Like(("mushroom",))),
        ("I have 3 eggs and 200 g rice", say.Have((("egg", Amount(3)), ("rice", Amount(200, "g"))))),
        ("I've got 200g of rice", say.Have((("rice", Amount(200, "g")),))),
        ("I bought half a litre of milk", say.Have((("milk", Amount(500, "ml")),))),
        ("we have a dozen eggs & some peas", say.Have((("egg", Amount(12)), ("pea", Amount())))),
        ("I ate the rice", say.Used((("rice", Amount()),))),
        ("I used 2 eggs", say.Used((("egg", Amount(2)),))),
        ("I'm out of milk and butter", say.Used((("milk", Amount()), ("butter", Amount())))),
        ("I don't have any eggs", say.Used((("egg", Amount()),))),
        ("I cooked the mushroom risotto", say.Cooked("mushroom risotto")),
        ("What can I cook?", say.Suggest()),
        ("what should we eat tonight?", say.Suggest()),
        ("Plan my week", say.Plan(7)),
        ("plan 3 days please", say.Plan(3)),
        ("how do I make the shakshuka?", say.HowTo("shakshuka")),
        ("What do you know about me?", say.AboutMe()),
        ("what's in my pantry", say.AboutMe()),
        ("forget everything", say.Forget()),
        ("Hi, I'm Ana", say.Hello()),
        ("the moon is far away", say.Unclear("the moon is far away")),
    ],
)
def test_a_sentence_is_understood(text: str, wish: say.Wish) -> None:
    assert say.understand(text) == [wish]


def test_a_message_may_hold_many_wishes() -> None:
    message = "Hi chef, I'm vegetarian and I don't like mushrooms. I have 1.5 kg potatoes. What can I cook?"
    assert say.understand(message) == [
        say.Diet(("vegetarian",)),
        say.Dislike(("mushroom",)),
        say.Have((("potato", Amount(1500, "g")),)),
        say.Suggest(),
    ]


@pytest.mark.parametrize("text", ["", "  \n ", "...", "?!"])
def test_nothing_said_is_nothing_wished(text: str) -> None:
    assert say.understand(text) == []


def test_quantities() -> None:
    assert parse_item("1/2 l of milk") == ("milk", Amount(500, "ml"))
    assert parse_item("two tins of tomatoes") == ("tomato", Amount(2, "tin"))
    assert parse_item("the") is None
    assert [singular(word) for word in ("berries", "radishes", "couscous", "bus", "eggs")] == [
        "berry",
        "radish",
        "couscous",
        "bus",
        "egg",
    ]
    assert str(Amount(1500, "g")) == "1.5 kg"
    assert Amount(3).minus(Amount(3)) is None
    assert Amount(3).minus(Amount(1, "kg")) == Amount(3), "what can't be compared stays"


# --- planning ------------------------------------------------------------------------------------


def test_the_book_is_consistent() -> None:
    assert len(book.RECIPES) >= 25
    assert len({recipe.name for recipe in book.RECIPES}) == len(book.RECIPES)
    foods = {food for recipe in book.RECIPES for food in recipe.needs}
    assert all(singular(food) == food for food in foods), "as the parser names them"
    assert all(trait in book.TRAITS for traits in book.DIETS.values() for trait in traits)
    for diet in book.DIETS:
        assert len([r for r in book.RECIPES if planner.allowed(r, Taste((diet,)))]) >= 7, f"a week of {diet}"


def test_what_is_in_the_pantry_comes_first() -> None:
    pantry = {"egg": Amount(3), "butter": Amount(100, "g"), "cheese": Amount()}
    best = planner.suggest(pantry, Taste(), recent=())[0]
    assert (best.recipe.name, best.missing) == ("omelette", {})


def test_what_is_short_is_what_is_missing() -> None:
    omelette = book.find("omelette")
    assert omelette is not None
    pantry = {"egg": Amount(1), "butter": Amount()}
    assert planner.missing(omelette, pantry) == {"egg": Amount(2), "cheese": Amount(40, "g")}


@pytest.mark.parametrize("diet", book.DIETS)
def test_a_diet_is_kept(diet: str) -> None:
    for suggestion in planner.suggest({}, Taste((diet,)), (), count=100):
        for food in suggestion.recipe.needs:
            assert not book.traits_of(food) & book.DIETS[diet]


@pytest.mark.parametrize(
    ("disliked", "gone"),
    [("mushroom", "mushroom"), ("fish", "cod"), ("cheese", "goat cheese"), ("nut", "peanut")],
)
def test_what_is_disliked_is_left_out(disliked: str, gone: str) -> None:
    for suggestion in planner.suggest({}, Taste(dislikes=(disliked,)), (), count=100):
        assert gone not in suggestion.recipe.needs


def test_a_plan_repeats_nothing_and_uses_the_pantry_up() -> None:
    pantry = {"egg": Amount(3), "butter": Amount(10, "g"), "cheese": Amount(40, "g")}
    plan = planner.plan(pantry, Taste(), recent=["omelette"], days=14)
    names = [each.recipe.name for each in plan]
    assert len(set(names)) == 14
    assert "omelette" not in names
    first = planner.plan(pantry, Taste(), [], 2)
    assert first[0].recipe.name == "omelette"
    assert "egg" not in planner.after(pantry, first[0].recipe)


def test_a_book_that_ends_before_the_plan_does_gives_what_there_is() -> None:
    everything = tuple(food for recipe in book.RECIPES[1:] for food in recipe.needs)
    only = [r for r in book.RECIPES if planner.allowed(r, Taste(dislikes=everything))]
    assert len(planner.plan({}, Taste(dislikes=everything), [], 7)) == len(only)


def test_what_two_dishes_need_is_bought_together() -> None:
    plan = planner.plan({}, Taste(), [], 14)
    bought = planner.shopping(plan)
    assert bought["rice"].count == sum(
        each.missing["rice"].count or 0 for each in plan if "rice" in each.missing
    )


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("dal", "red lentil dal"),
        ("risotto", "mushroom risotto"),
        ("curry", "chickpea curry"),
        ("cake", None),
        ("", None),
    ],
)
def test_a_dish_is_found_by_a_part_of_its_name(words: str, name: str | None) -> None:
    found = book.find(words)
    assert (found.name if found else None) == name


# --- the agent -----------------------------------------------------------------------------------

Tell = Callable[[str], str]


@pytest.fixture
def tell(tmp_path: Path) -> Tell:
    def one(message: str) -> str:
        asked: dict[str, Any] = {"id": "t", "user": "ana", "message": message}
        return "".join(chef.chef(Turn(asked, {}, tmp_path, lambda said: None, lambda run: {})))

    return one


def test_it_remembers_across_turns(tell: Tell) -> None:
    tell("I'm vegetarian. I don't like mushrooms. I have 3 eggs and 200 g rice.")
    assert tell("what do you know about me?") == (
        "Diet: vegetarian. Dislikes: mushrooms. Pantry: 3 eggs and 200 g rice."
    )


def test_cooking_uses_up_the_pantry_and_is_not_suggested_again(tell: Tell) -> None:
    tell("I have 5 eggs, 100 g butter and 40 g cheese")
    assert tell("what can I cook?").startswith("Omelette (10 minutes): you have everything.")
    tell("I cooked the omelette")
    assert "Pantry: 90 g butter and 2 eggs. Cooked lately: omelette." in tell("what do you know about me?")
    assert "Omelette" not in tell("what can I cook?")


def test_using_and_running_out(tell: Tell) -> None:
    tell("I have 5 eggs")
    assert tell("I used 2 eggs") == "3 eggs left."
    assert tell("I ate the eggs") == "No eggs left."
    assert tell("I ate the rice") == "I knew of no rice in the pantry."


def test_it_forgets_everything(tell: Tell) -> None:
    tell("I'm vegan. I hate rice. I have 2 lemons. I cooked the dal")
    tell("forget everything")
    assert tell("what do you know about me?") == "Diet: everything. Pantry: empty."


def test_a_failed_turn_changes_nothing(tell: Tell, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object) -> str:
        raise RuntimeError

    tell("I have 3 eggs")
    monkeypatch.setattr(chef, "_suggest", fails)
    with pytest.raises(RuntimeError):
        tell("I'm vegan. What can I cook?")
    assert tell("what do you know about me?") == "Diet: everything. Pantry: 3 eggs."


def test_what_it_does_not_understand_it_says(tell: Tell) -> None:
    assert "did not understand “the moon is far”" in tell("the moon is far")


@pytest.mark.parametrize("name", ["hello", "chef", "anything"])
def test_the_examples_can_be_deployed(name: str) -> None:
    _, policy = check(Path(__file__).parents[3] / "examples" / name)
    assert policy.agent.name == name


def test_the_state_of_a_local_try_is_not_deployed(tmp_path: Path) -> None:
    (tmp_path / ".roost-state").mkdir()
    (tmp_path / ".roost-state" / "chef.db").write_text("private")
    assert pack(tmp_path).root == pack(Path(tempfile.mkdtemp(dir=tmp_path.parent))).root
