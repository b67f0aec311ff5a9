"""Keeps a list of numbers twice: in the turn's state, and in a SQLite file that stays open, in WAL mode."""

import json
import sqlite3

from roost import Agent

agent = Agent()
OPEN = {}


def database(state_dir):
    if "it" not in OPEN:
        OPEN["it"] = it = sqlite3.connect(state_dir / "numbers.db", isolation_level=None)
        it.execute("PRAGMA journal_mode=WAL")
        it.execute("PRAGMA wal_autocheckpoint=20")  # pages: so that it also happens in the middle of a run
        it.execute("CREATE TABLE IF NOT EXISTS numbers (place INTEGER PRIMARY KEY, number INTEGER)")
    return OPEN["it"]


@agent.turn
def ledger(turn):
    """`append N` or `read`; both answer with all numbers so far."""
    command, _, number = turn.message.partition(" ")
    numbers = turn.state.setdefault("numbers", [])
    it = database(turn.state_dir)
    if command == "append":
        numbers.append(int(number))
        it.execute("INSERT INTO numbers (number) VALUES (?)", (int(number),))
    rows = it.execute("SELECT number FROM numbers ORDER BY place").fetchall()
    return json.dumps({"state": numbers, "sqlite": [row[0] for row in rows]})
