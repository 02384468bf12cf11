"""Every clause has a scenario, and every scenario a clause."""

import ast
from pathlib import Path

from tests.contract.clauses import clauses, number_of


def scenarios() -> list[int]:
    found = []
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and (number := number_of(node.name)) is not None:
                found.append(number)
    return found


def test_every_clause_has_one_scenario_and_every_scenario_its_clause() -> None:
    assert sorted(scenarios()) == sorted(clauses())


def test_a_clause_is_a_sentence() -> None:
    for number, sentence in clauses().items():
        assert sentence.endswith("."), f"C{number}: {sentence}"
