#!/usr/bin/env python3
"""Ask a running server the problems of a GSM8K-format file and count the right answers.

Every question goes out as one user message to ``POST /v1/chat/completions``, greedy, over mutual
TLS; the last number of the answer, or the one after ``####``, is compared with the gold number::

    python scripts/eval_accuracy.py --data models/mindie-tiny/heldout.jsonl --min-accuracy 0.9

What a change costs shows in the answers before it shows in the numbers at their ends: ``--json FILE`` keeps
them, and a later run ``--against FILE`` tells how many are still the same text.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import ssl
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import aiohttp

REPOSITORY = Path(__file__).resolve().parent.parent
CLIENT_FILES = REPOSITORY / "mindie-service" / "security" / "client"
HELDOUT = REPOSITORY / "models" / "mindie-tiny" / "heldout.jsonl"

# A minus sign counts only where it cannot be an operator or a hyphen: not right after a word or digit.
NUMBER = re.compile(r"(?<![\w.])-?\$?\d+(?:,\d{3})*(?:\.\d+)?|\d+(?:,\d{3})*(?:\.\d+)?")
MARK = "####"


def _number(text: str) -> Decimal:
    """The value of one match of ``NUMBER``."""
    return Decimal(text.replace(",", "").replace("$", ""))


def gold_answer(answer: str) -> Decimal:
    """The number after ``####`` in a GSM8K answer; ``ValueError`` where there is none."""
    _, mark, tail = answer.rpartition(MARK)
    found = NUMBER.search(tail) if mark else None
    if found is None:
        raise ValueError(f"no number after {MARK}: {answer!r}")
    return _number(found.group())


def predicted_answer(text: str) -> Decimal | None:
    """The number a model's answer ends in, or None where it names none.

    The first number after the last ``####`` wins; a text without such a mark is read by its last number.
    """
    _, mark, tail = text.rpartition(MARK)
    if mark and (found := NUMBER.search(tail)):
        return _number(found.group())
    numbers = NUMBER.findall(text)
    return _number(numbers[-1]) if numbers else None


@dataclass(frozen=True)
class Item:
    """One line of the data file."""

    question: str
    gold: Decimal


@dataclass(frozen=True)
class Outcome:
    """What the server said to one question; ``error`` is set where it gave no answer."""

    question: str
    gold: str
    predicted: str | None
    text: str
    error: str | None

    @property
    def right(self) -> bool:
        """Whether the numbers are equal in value (``13`` and ``13.0`` are)."""
        return self.predicted is not None and Decimal(self.predicted) == Decimal(self.gold)


def load_items(path: Path, limit: int | None = None) -> list[Item]:
    """The first ``limit`` problems of a GSM8K-format file."""
    with path.open(encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines if line.strip()]
    return [Item(record["question"], gold_answer(record["answer"])) for record in records[:limit]]


def client_context(cacert: Path, cert: Path, key: Path) -> ssl.SSLContext:
    """TLS that trusts ``cacert`` only and shows the client certificate."""
    context = ssl.create_default_context(cafile=str(cacert))
    context.load_cert_chain(str(cert), str(key))
    return context


async def first_model(session: aiohttp.ClientSession, url: str) -> str:
    """The id of the first model the server lists."""
    async with session.get(f"{url}/v1/models") as response:
        response.raise_for_status()
        listed = await response.json()
    return str(listed["data"][0]["id"])


async def ask(session: aiohttp.ClientSession, url: str, model: str, max_tokens: int, item: Item) -> Outcome:
    """One question, one greedy answer."""
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": item.question}],
        "temperature": 0,
        "max_tokens": max_tokens,
        "stream": False,
    }
    gold = str(item.gold)
    try:
        async with session.post(f"{url}/v1/chat/completions", json=body) as response:
            if response.status != 200:
                reason = (await response.text())[:300]
                return Outcome(item.question, gold, None, "", f"HTTP {response.status}: {reason}")
            reply = await response.json()
        text = str(reply["choices"][0]["message"]["content"] or "")
    except (aiohttp.ClientError, asyncio.TimeoutError, ValueError, LookupError, TypeError) as error:
        return Outcome(item.question, gold, None, "", f"{type(error).__name__}: {error}")
    predicted = predicted_answer(text)
    return Outcome(item.question, gold, None if predicted is None else str(predicted), text, None)


def draw_progress(done: int, right: int, total: int, width: int = 30) -> None:
    """Redraw the bar on a terminal; print a line every tenth of the way elsewhere."""
    line = f"{done}/{total}  right {right / max(done, 1):.1%}"
    if sys.stderr.isatty():
        filled = width * done // total
        end = "\n" if done == total else ""
        print(f"\r[{'#' * filled}{'.' * (width - filled)}] {line}", end=end, file=sys.stderr, flush=True)
    elif done == total or done % max(1, total // 10) == 0:
        print(line, file=sys.stderr, flush=True)


async def evaluate(args: argparse.Namespace, items: Sequence[Item]) -> tuple[str, list[Outcome]]:
    """The model's name and the outcome of every item, in the order of the file."""
    url = args.url.rstrip("/")
    context = client_context(args.cacert, args.cert, args.key) if url.startswith("https") else None
    timeout = aiohttp.ClientTimeout(total=args.timeout)
    connector = aiohttp.TCPConnector(limit=args.concurrency, ssl=context if context is not None else True)
    outcomes: list[Outcome | None] = [None] * len(items)
    queue = iter(enumerate(items))
    done = right = 0

    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        model = args.model or await first_model(session, url)

        async def worker() -> None:
            nonlocal done, right
            for index, item in queue:
                outcome = await ask(session, url, model, args.max_tokens, item)
                outcomes[index] = outcome
                done += 1
                right += outcome.right
                draw_progress(done, right, len(items))

        await asyncio.gather(*(worker() for _ in range(min(args.concurrency, len(items)))))
    return model, [outcome for outcome in outcomes if outcome is not None]


def show_wrong(outcomes: Sequence[Outcome], count: int) -> None:
    """Print the first ``count`` wrong answers beside what was asked."""
    for outcome in [o for o in outcomes if not o.right][:count]:
        print(f"\nQ: {outcome.question}\nA: {outcome.error or outcome.text}")
        print(f"gold {outcome.gold}, predicted {outcome.predicted}")


def same_answers(outcomes: Sequence[Outcome], earlier: Path) -> tuple[int, int]:
    """How many answers are those of an earlier run's file, and to how many questions both have one."""
    report = json.loads(earlier.read_text(encoding="utf-8"))
    before = {item["question"]: item["text"] for item in report["outcomes"] if item["error"] is None}
    both = [outcome for outcome in outcomes if outcome.error is None and outcome.question in before]
    if not both:
        raise ValueError(f"{earlier} holds no answer to any of these questions")
    return sum(outcome.text == before[outcome.question] for outcome in both), len(both)


def positive_int(text: str) -> int:
    """An argparse type."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=HELDOUT, help="GSM8K-format jsonl")
    parser.add_argument("--url", default="https://127.0.0.1:1025")
    parser.add_argument("--cacert", type=Path, default=CLIENT_FILES / "ca.pem")
    parser.add_argument("--cert", type=Path, default=CLIENT_FILES / "client.pem")
    parser.add_argument("--key", type=Path, default=CLIENT_FILES / "client.key.pem")
    parser.add_argument("--model", help="default: the first that GET /v1/models lists")
    parser.add_argument("--concurrency", type=positive_int, default=16)
    parser.add_argument("--max-tokens", type=positive_int, default=256)
    parser.add_argument("--timeout", type=float, default=300, help="seconds a request may take")
    parser.add_argument("--limit", type=positive_int, help="ask only the first N questions")
    parser.add_argument("--show-wrong", type=int, nargs="?", const=5, default=0, metavar="N",
                        help="print N wrong answers (5 when no N is given)")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the summary and every outcome here")
    parser.add_argument("--against", type=Path, metavar="FILE",
                        help="an earlier --json: count the answers that are the same text")  # fmt: skip
    parser.add_argument("--min-accuracy", type=float, help="exit with 1 below this share (0 to 1)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the evaluation; 0 when it is good enough, 1 when not, 2 when it could not be run."""
    args = parse_args(argv)
    started = time.monotonic()
    try:
        items = load_items(args.data, args.limit)
        if not items:
            raise ValueError(f"{args.data} holds no problems")
        model, outcomes = asyncio.run(evaluate(args, items))
        same, both = same_answers(outcomes, args.against) if args.against else (0, 0)
    except (OSError, ValueError, LookupError, aiohttp.ClientError, asyncio.TimeoutError) as error:
        print(f"cannot evaluate: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    right = sum(outcome.right for outcome in outcomes)
    failed = sum(outcome.error is not None for outcome in outcomes)
    share = right / len(outcomes)
    summary = {
        "model": model,
        "data": str(args.data),
        "total": len(outcomes),
        "right": right,
        "wrong": len(outcomes) - right,
        "failed_requests": failed,
        "accuracy": round(share, 6),
        "seconds": round(time.monotonic() - started, 2),
    }
    show_wrong(outcomes, args.show_wrong)
    print(
        f"{model}: accuracy {share:.2%} ({right} of {len(outcomes)} right, {len(outcomes) - right} wrong, "
        f"{failed} failed requests) in {summary['seconds']} s"
    )
    if args.against:
        print(f"{same} of {both} answers ({same / both:.2%}) are the same text as in {args.against}")
    if args.json:
        report = summary | {"outcomes": [asdict(o) | {"right": o.right} for o in outcomes]}
        args.json.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return int(args.min_accuracy is not None and share < args.min_accuracy)


if __name__ == "__main__":
    sys.exit(main())
