"""Every row of the abuse table has a test that bears its id, and a line in docs/security.md."""

from __future__ import annotations

import ast
import re

from tests.harness import REPO

ROWS = {f"A{number:02}" for number in range(1, 34)}


def rows_of_tests() -> set[str]:
    """The ids in the names of all test functions."""
    names = {
        node.name
        for path in (REPO / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    }
    return {row for name in names for row in re.findall(r"(?<=_)A\d\d(?=_)", name)}


def rows_of_document() -> set[str]:
    """The ids that begin a line of a table; `A07 to A10` are four."""
    text = (REPO / "docs" / "security.md").read_text(encoding="utf-8")
    found = set()
    for cell in re.findall(r"^\| (A\d\d[^|]*) \|", text, re.MULTILINE):
        numbers = [int(number) for number in re.findall(r"A(\d\d)", cell)]
        if " to " in cell:
            numbers = list(range(numbers[0], numbers[-1] + 1))
        found |= {f"A{number:02}" for number in numbers}
    return found


def test_every_abuse_row_has_a_test() -> None:
    assert rows_of_tests() == ROWS


def test_every_abuse_row_is_in_the_document() -> None:
    assert rows_of_document() == ROWS
