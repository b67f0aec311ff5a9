"""Measures: `python -m bench.run NAME ...`, or all without a name.

Each bench/<name>.py has `main(data: Path) -> dict[str, float]`: it prints its table and returns its figures,
which are left in bench/out/<name>.json. `data` is bench/data, where data sets may lie that are not ours to
give away.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
OUT = HERE / "out"
_NOT_ONE = {"run", "__init__"}


def names() -> list[str]:
    return sorted(f.stem for f in HERE.glob("*.py") if f.stem not in _NOT_ONE and not f.stem.startswith("_"))


def main() -> None:
    wanted = sys.argv[1:] or names()
    unknown = set(wanted) - set(names())
    if unknown:
        sys.exit(f"there is no benchmark {', '.join(sorted(unknown))}; there are {', '.join(names())}")
    OUT.mkdir(exist_ok=True)
    for name in wanted:
        figures: dict[str, float] = importlib.import_module(f"bench.{name}").main(HERE / "data")
        file = OUT / f"{name}.json"
        file.write_text(json.dumps({"figures": figures}, indent=1) + "\n")
        print(f"figures are in {file}")


if __name__ == "__main__":
    main()
