#!/usr/bin/env python3
"""Lay the held-out problems out as AISBench expects its gsm8k data set.

AISBench looks for ``ais_bench/datasets/gsm8k/{train,test}.jsonl`` below ``AIS_BENCH_DATASETS_CACHE``; with
that variable set to the directory written here, its gsm8k tasks ask these problems instead::

    python scripts/export_heldout.py --out aisbench/data

Every problem goes to ``test.jsonl``. ``train.jsonl`` stays empty: AISBench opens it, but takes the worked
examples of its prompts from the task's own text.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

HELDOUT = Path(__file__).resolve().parent.parent / "models" / "mindie-tiny" / "heldout.jsonl"
LAYOUT = Path("ais_bench", "datasets", "gsm8k")

# AISBench's gold number is all that follows the first "#### ", without commas; it must be whole.
GOLD = re.compile(r"(?:(?!#### ).)*#### -?\d{1,3}(?:(?:,\d{3})*|\d*)\n?", re.DOTALL)


def checked_record(line: str) -> dict[str, str]:
    """The question and answer of one line; ``ValueError`` names what AISBench could not score."""
    record = json.loads(line)
    fields = {}
    for name in ("question", "answer"):
        value = record.get(name) if isinstance(record, dict) else None
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{name} is {value!r}; it must be a text that is not empty")
        fields[name] = value
    if not GOLD.fullmatch(fields["answer"]):
        raise ValueError(f"answer {fields['answer']!r} must end in '#### N', once, N a whole number")
    return fields


def read_problems(path: Path) -> list[dict[str, str]]:
    """All problems of a GSM8K-format file; ``ValueError`` names file and line of the first bad one."""
    problems = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            problems.append(checked_record(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    if not problems:
        raise ValueError(f"{path} holds no problems")
    return problems


def export(problems: Sequence[dict[str, str]], out: Path) -> Path:
    """Write the data set below ``out``; the folder that holds its two files."""
    folder = out / LAYOUT
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(problem, ensure_ascii=False) + "\n" for problem in problems]
    (folder / "test.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "train.jsonl").write_text("", encoding="utf-8")
    return folder


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=HELDOUT, help="GSM8K-format jsonl")
    parser.add_argument("--out", type=Path, required=True, help="the future AIS_BENCH_DATASETS_CACHE")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the data set; 0 when it is there, 2 when it could not be made."""
    args = parse_args(argv)
    try:
        problems = read_problems(args.data)
        folder = export(problems, args.out)
    except (OSError, ValueError) as error:
        print(f"cannot export: {error}", file=sys.stderr)
        return 2
    print(f"{len(problems)} problems in {folder}")
    print(f"export AIS_BENCH_DATASETS_CACHE={args.out.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
