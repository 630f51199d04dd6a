"""Every row of abuse, faults and promises has a test that bears its id; documents name tests that exist."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

from tests.harness import REPO

SECURITY = (REPO / "docs" / "security.md").read_text(encoding="utf-8")
RELIABILITY = (REPO / "docs" / "reliability.md").read_text(encoding="utf-8")
ABUSE = {f"A{number:02}" for number in range(1, 34)}
FAULTS = {f"F{number:02}" for number in range(1, 33)}
PROMISES = {f"P{number}" for number in range(1, 16)}
ROWS = ABUSE | FAULTS | PROMISES
WITHOUT_TEST = {
    "F28": "a device that is lost: there is none but the CPU here",
    "F30": "a day of load is no test; scripts/soak.py is run by hand",
}
ID = re.compile(r"(?<=_)(?:[AF]\d\d|P\d{1,2})(?=_)")
CELLS = re.compile(r"^\| ([AFP]\d[^|]*) \|(.*)\|$", re.MULTILINE)  # of a line that begins with an id


def read_names() -> dict[Path, list[str]]:
    """The names of all test functions."""
    found = {}
    for path in sorted((REPO / "tests").rglob("test_*.py")):
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        functions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        found[path] = [node.name for node in functions if node.name.startswith("test_")]
    return found


TESTS = read_names()
NAMES = {name for names in TESTS.values() for name in names}


def lines_of(document: str) -> dict[str, str]:
    """What follows the id in each line of a table; `A07 to A10` are four, `A20, A21` two."""
    found: dict[str, str] = {}
    for ids, rest in CELLS.findall(document):
        each = re.findall(r"[AFP]\d+", ids)
        if " to " in ids:
            letter, first, last = ids[0], int(each[0][1:]), int(each[-1][1:])
            each = [f"{letter}{number:02}" for number in range(first, last + 1)]
        assert not found.keys() & set(each), f"{ids} is there twice"
        found |= dict.fromkeys(each, rest)
    return found


def file_of(name: str) -> Path | None:
    """As the documents name files: those of scripts with their folder, tests without `tests/`."""
    places = (REPO / name, REPO / "tests" / name, REPO / "tests" / "reliability" / name)
    return next((place for place in places if place.is_file()), None)


def test_every_row_has_a_test() -> None:
    by_id: dict[str, int] = defaultdict(int)
    for name in NAMES:
        for row in ID.findall(name):
            by_id[row] += 1
    assert by_id.keys() <= ROWS, "no such row"
    assert ROWS - by_id.keys() == WITHOUT_TEST.keys()


def test_the_document_of_security_has_every_abuse_row_and_promise() -> None:
    assert lines_of(SECURITY).keys() == ABUSE | PROMISES


@pytest.mark.parametrize("document", [SECURITY, RELIABILITY], ids=["security", "reliability"])
def test_what_the_documents_name_exists(document: str) -> None:
    for name in re.findall(r"`([\w/.]+\.py)`", document):
        assert file_of(name), name
    assert set(re.findall(r"`(test_\w+)`", document)) <= NAMES


def test_the_files_of_an_abuse_row_have_tests_of_it() -> None:
    for row, line in lines_of(SECURITY).items():
        if row not in ABUSE:
            continue
        files = re.findall(r"`([\w/.]+\.py)`", line.rpartition("|")[2])
        tests = [name for file in files if (path := file_of(file)) for name in TESTS[path]]
        assert any(f"_{row}_" in name for name in tests), (row, files)


def test_the_document_of_reliability_names_a_test_of_every_row() -> None:
    lines = lines_of(RELIABILITY)
    assert lines.keys() == ROWS
    for row, line in lines.items():
        named = re.findall(r"`(test_\w+)`", line)
        assert all(f"_{row}_" in name for name in named), (row, named)
        assert bool(named) != (row in WITHOUT_TEST), (row, named)
