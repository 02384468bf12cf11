"""The numbered clauses of `protocol/README.md`."""

import re
from pathlib import Path

import protocol

README = Path(protocol.__file__).parent / "README.md"


def clauses() -> dict[int, str]:
    """Return each clause's sentence by its number, in the order in which they stand."""
    found = re.findall(r"^\| C(\d+) \| (.+?) \|$", README.read_text(encoding="utf-8"), re.MULTILINE)
    numbers = [int(number) for number, _ in found]
    assert numbers == list(range(1, len(numbers) + 1)), f"clauses are numbered from 1 on: {numbers}"
    return {int(number): sentence for number, sentence in found}


def number_of(test: str) -> int | None:
    """Return which clause a scenario is for, by its name: `test_c07_...`."""
    found = re.match(r"test_c(\d+)_", test)
    return int(found[1]) if found else None
