"""Reading the example configurations as their readers will: as they are, and with every key uncommented."""

import dataclasses
import re
from typing import Any


def uncommented(example: str) -> str:
    return re.sub(r"^# (\[[\w.]+\]|\[\[[\w.]+\]\]|\w+ = .*)$", r"\1", example, flags=re.MULTILINE)


def missing_keys(example: str, *loaded: Any) -> list[str]:
    """Keys of the dataclasses `loaded` that the example doesn't show."""
    text = uncommented(example)
    names = [field.name for part in loaded for field in dataclasses.fields(part)]
    return [name for name in names if not re.search(rf"^(\[{name}[.\]]|{name} = )", text, re.MULTILINE)]
