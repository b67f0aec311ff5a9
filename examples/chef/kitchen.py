"""What the chef knows about its user, in SQLite: diet, dislikes, pantry, and meals that were cooked."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from quantities import Amount

_SCHEMA = """
CREATE TABLE IF NOT EXISTS diet (name TEXT PRIMARY KEY);
CREATE TABLE IF NOT EXISTS dislike (food TEXT PRIMARY KEY);
CREATE TABLE IF NOT EXISTS pantry (food TEXT PRIMARY KEY, count REAL, unit TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS meal (number INTEGER PRIMARY KEY, recipe TEXT NOT NULL);
"""


class Kitchen:
    """Opened for one turn. Leaving the block commits, or after an error changes nothing."""

    def __init__(self, file: Path) -> None:
        self._db = sqlite3.connect(file)

    def __enter__(self) -> Kitchen:
        self._db.executescript(_SCHEMA)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._db.commit()
        self._db.close()

    # --- diet and taste ---

    def diets(self) -> list[str]:
        return self._column("SELECT name FROM diet ORDER BY name")

    def keep_diets(self, names: Iterable[str]) -> None:
        self._db.executemany("INSERT OR IGNORE INTO diet VALUES (?)", [(name,) for name in names])

    def drop_diets(self, names: Iterable[str]) -> None:
        self._db.executemany("DELETE FROM diet WHERE name = ?", [(name,) for name in names])

    def dislikes(self) -> list[str]:
        return self._column("SELECT food FROM dislike ORDER BY food")

    def dislike(self, foods: Iterable[str]) -> None:
        self._db.executemany("INSERT OR IGNORE INTO dislike VALUES (?)", [(food,) for food in foods])

    def like(self, foods: Iterable[str]) -> None:
        self._db.executemany("DELETE FROM dislike WHERE food = ?", [(food,) for food in foods])

    # --- pantry ---

    def pantry(self) -> dict[str, Amount]:
        rows = self._db.execute("SELECT food, count, unit FROM pantry ORDER BY food")
        return {food: Amount(count, unit) for food, count, unit in rows}

    def store(self, food: str, amount: Amount) -> None:
        """Adds to what is there."""
        there = self.pantry().get(food)
        self._put(food, amount if there is None else there.plus(amount))

    def use(self, food: str, amount: Amount) -> Amount | None:
        """Takes from what is there (all of it, if the amount is not told) and returns what is left."""
        there = self.pantry().get(food)
        left = None if there is None or amount.count is None else there.minus(amount)
        if left is None:
            self._db.execute("DELETE FROM pantry WHERE food = ?", (food,))
        else:
            self._put(food, left)
        return left

    # --- meals ---

    def cooked(self, recipe: str) -> None:
        self._db.execute("INSERT INTO meal (recipe) VALUES (?)", (recipe,))

    def recent_meals(self, count: int = 5) -> list[str]:
        """The latest first."""
        rows = self._db.execute("SELECT recipe FROM meal ORDER BY number DESC LIMIT ?", (count,))
        return [row[0] for row in rows]

    def forget_everything(self) -> None:
        for table in ("diet", "dislike", "pantry", "meal"):
            self._db.execute(f"DELETE FROM {table}")

    def _put(self, food: str, amount: Amount) -> None:
        self._db.execute(
            "INSERT INTO pantry VALUES (?, ?, ?) ON CONFLICT (food) DO UPDATE SET count = ?2, unit = ?3",
            (food, amount.count, amount.unit),
        )

    def _column(self, query: str) -> list[str]:
        return [row[0] for row in self._db.execute(query)]
