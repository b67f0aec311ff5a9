"""Plain sentences to wishes. Pure; what it does not understand is `Unclear`, never guessed at."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from book import DIETS
from quantities import Amount, parse_item, singular


@dataclass(frozen=True)
class Diet:
    names: tuple[str, ...]
    dropped: bool = False  # no longer kept; without names: none at all


@dataclass(frozen=True)
class Dislike:
    foods: tuple[str, ...]


@dataclass(frozen=True)
class Like:
    foods: tuple[str, ...]


@dataclass(frozen=True)
class Have:
    items: tuple[tuple[str, Amount], ...]


@dataclass(frozen=True)
class Used:
    """Without an amount, all of it."""

    items: tuple[tuple[str, Amount], ...]


@dataclass(frozen=True)
class Cooked:
    dish: str


@dataclass(frozen=True)
class Suggest:
    pass


@dataclass(frozen=True)
class Plan:
    days: int


@dataclass(frozen=True)
class HowTo:
    dish: str


@dataclass(frozen=True)
class AboutMe:
    pass


@dataclass(frozen=True)
class Forget:
    pass


@dataclass(frozen=True)
class Hello:
    pass


@dataclass(frozen=True)
class Unclear:
    text: str


Wish = (
    Diet | Dislike | Like | Have | Used | Cooked | Suggest | Plan | HowTo | AboutMe | Forget | Hello | Unclear
)

_DIET_WORDS = {
    "vegetarian": "vegetarian", "veggie": "vegetarian", "vegan": "vegan", "pescatarian": "pescatarian",
    "pescetarian": "pescatarian", "gluten-free": "gluten-free", "gluten free": "gluten-free",
    "coeliac": "gluten-free", "celiac": "gluten-free", "dairy-free": "dairy-free", "dairy free": "dairy-free",
    "lactose intolerant": "dairy-free", "lactose-free": "dairy-free", "nut-free": "nut-free",
    "no pork": "pork-free", "pork-free": "pork-free", "halal": "pork-free",
}  # fmt: skip
assert set(_DIET_WORDS.values()) == set(DIETS)

_INTRODUCTION = re.compile(r"^(?:hi|hello|hey)[ ,]+(?:i'm|i am|this is|my name is) \w+$", re.IGNORECASE)
_SENTENCE = re.compile(r"[.!?;]+(?=\s|$)|\n|,?\s+(?:and|but)\s+(?=(?:i|we)\b)", re.IGNORECASE)
_LIST = re.compile(r"\s*(?:,|&|\+)\s*(?:and\s+|or\s+)?|\s+(?:and|or|nor)\s+")


def understand(message: str) -> list[Wish]:
    """All wishes of a message, in order."""
    parts = [part.strip(" ,") for part in _SENTENCE.split(message.replace("’", "'"))]
    return [_one(part) for part in parts if part]


def _one(sentence: str) -> Wish:
    if _INTRODUCTION.match(sentence):
        return Hello()
    text = re.sub(r"^(?:(?:and|but|so|ok|okay|well|hi|hello|hey|please|chef)[, ]+)+", "", sentence.lower())
    text = re.sub(r"\s+", " ", text).strip()
    for pattern, make in _COMPILED:
        match = pattern.search(text)
        if match:
            wish = make(match)
            if wish is not None:
                return wish
    return Unclear(sentence)


def _diet(match: re.Match[str]) -> Wish | None:
    text = match.string
    names = dict.fromkeys(diet for word, diet in _DIET_WORDS.items() if re.search(rf"\b{word}\b", text))
    if not names:
        return None
    dropped = re.search(r"\b(?:not|no longer|stopped|isn't|aren't)\b", text) is not None
    return Diet(tuple(names), dropped)


def _foods(match: re.Match[str]) -> tuple[str, ...]:
    parsed = (parse_item(part) for part in _LIST.split(match["what"]))
    return tuple(item[0] for item in parsed if item is not None)


def _items(match: re.Match[str]) -> tuple[tuple[str, Amount], ...]:
    parsed = (parse_item(part) for part in _LIST.split(match["what"]))
    return tuple(item for item in parsed if item is not None)


def _like(match: re.Match[str]) -> Wish | None:
    foods = _foods(match)
    return Like(foods) if foods else None


def _dislike(match: re.Match[str]) -> Wish | None:
    foods = _foods(match)
    return Dislike(foods) if foods else None


def _have(match: re.Match[str]) -> Wish | None:
    items = _items(match)
    return Have(items) if items else None


def _used(match: re.Match[str]) -> Wish | None:
    items = _items(match)
    return Used(items) if items else None


def _plan(match: re.Match[str]) -> Wish:
    number = re.search(r"\b(\d{1,2})\b", match.string)
    if number:
        return Plan(max(1, min(14, int(number[1]))))
    return Plan(1 if re.search(r"\b(?:today|tonight|tomorrow)\b", match.string) else 7)


def _dish(match: re.Match[str]) -> str:
    return singular(re.sub(r"^(?:the|a|an|some|my|that|your)\s+", "", match["what"]))


def _out(match: re.Match[str]) -> Wish | None:
    items = tuple((food, Amount()) for food in _foods(match))
    return Used(items) if items else None


# The first that fits counts, so what is more particular stands before what is more general.
_RULES: tuple[tuple[str, Callable[[re.Match[str]], Wish | None]], ...] = (
    (r"^forget (?:everything|all|me)\b|^start over$", lambda m: Forget()),
    (r"^what (?:do|have) (?:i|we) (?:have|got)\b|what(?:'s| is) in my pantry", lambda m: AboutMe()),
    (r"what (?:do|have) you (?:know|remember|learn)|who am i|about me\b", lambda m: AboutMe()),
    (r"\bplan\b|what (?:shall|should|can|could) I (?:eat|cook) this week|meals? for \d+ days", _plan),
    (r"how (?:do|can|would) (?:I|you) (?:make|cook|prepare) (?P<what>.+)", lambda m: HowTo(_dish(m))),
    (r"(?:the )?recipe (?:for|of) (?P<what>.+)", lambda m: HowTo(_dish(m))),
    (r"what (?:can|could|should|shall|do) I (?:cook|eat|make)|what's for", lambda m: Suggest()),
    (r"suggest|recommend|any ideas|AM hungry|another idea|something else", lambda m: Suggest()),
    (r"^I (?:eat|like) (?:anything|everything)", lambda m: Diet((), dropped=True)),
    (r"^(?:I|HAVE) (?:just )?(?:cooked|made|prepared) (?P<what>.+)", lambda m: Cooked(_dish(m))),
    (r"^(?:AM (?:all )?out of|there(?:'s| is| are) no more) (?P<what>.+)", _out),
    (r"^AM allergic to (?P<what>.+)", _dislike),
    (r"^(?:AM|I (?:eat|keep|live|follow|stopped)|I NOT eat|no) .+", _diet),
    (r"^I NOT have (?:any )?(?:more )?(?P<what>.+)", _used),
    (r"^I (?:really )?(?:NOT (?:like|eat|want|stand)|hate|dislike) (?P<what>.+)", _dislike),
    (r"^(?:no|without) (?P<what>.+)", _dislike),
    (r"^I (?:really |do |now )?(?:like|love|enjoy) (?P<what>.+)", _like),
    (r"^(?:I|HAVE) (?:just )?(?:ate|eaten|used(?: up)?|finished|threw away) (?P<what>.+)", _used),
    (r"^(?:I|HAVE) (?:also |just |still )?(?:got|bought|found|have) (?:also |still )?(?P<what>.+)", _have),
    (r"^HAVE (?:also |still )?(?P<what>.+)", _have),
    (r"^(?:hi|hello|hey|good (?:morning|evening|day)|thanks|thank you)\b", lambda m: Hello()),
)


def _compiled(pattern: str) -> re.Pattern[str]:
    """Patterns are for lower-case text; the words in capitals stand for all their forms."""
    forms = {
        "AM": r"(?:i|we)(?:'m| am|'re| are)",
        "HAVE": r"(?:i|we)(?:'ve| have)",
        "NOT": r"(?:do not|don't|dont|can't|cannot|can not|won't)",
        "I": r"(?:i|we)",
    }
    return re.compile(re.sub(r"\b(?:AM|HAVE|NOT|I)\b", lambda word: forms[word[0]], pattern))


_COMPILED = [(_compiled(pattern), make) for pattern, make in _RULES]
