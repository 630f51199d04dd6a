"""The ledger of a run: every request that was sent ends once, and the server's counters have to agree."""

from __future__ import annotations

import math
import re
import urllib.request
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum

from fuzz_cases import HOST
from traffic_requests import Ask


class Fate(Enum):
    """The one end of a request, as its client saw it."""

    FINISHED = "finished"
    ERROR = "error"  # status 500, or an error event in a stream that then ended properly
    REFUSED = "refused"  # 4xx or 503 with a proper body
    CANCELLED = "cancelled"  # by us
    LOST = "lost"  # no answer, half of one, or one that is no proper answer


class Manner(Enum):
    """How a client treats its answer."""

    READS = "reads"
    HANGS_UP = "hangs up"
    READS_SLOWLY = "reads slowly"
    SPOILS = "spoils"  # sends a body with mistakes


@dataclass(frozen=True, slots=True)
class Ending:
    """What became of one request. Times are monotonic seconds."""

    manner: Manner
    dialect: str
    fate: Fate
    detail: str
    sent: float
    first: float | None  # when the first byte of the answer came
    ended: float
    ask: Ask | None = None  # None: the body was spoilt
    text: str = ""  # of a finished one


@dataclass(slots=True)
class Ledger:
    """Every request that was sent, and its end."""

    sent: int = 0
    endings: list[Ending] = field(default_factory=list)

    @property
    def open(self) -> int:
        return self.sent - len(self.endings)

    def count(self, *fates: Fate) -> int:
        return sum(ending.fate in fates for ending in self.endings)

    @property
    def lost(self) -> list[Ending]:
        return [ending for ending in self.endings if ending.fate is Fate.LOST]

    def table(self) -> str:
        """Markdown: a row per manner of the client, a column per fate."""
        counts = Counter((ending.manner, ending.fate) for ending in self.endings)
        lines = [
            "| client | sent | " + " | ".join(fate.value for fate in Fate) + " |",
            "|---" * (len(Fate) + 2) + "|",
        ]
        for manner in Manner:
            row = [counts[manner, fate] for fate in Fate]
            if any(row):
                lines.append(f"| {manner.value} | {sum(row)} | {' | '.join(map(str, row))} |")
        row = [self.count(fate) for fate in Fate]
        return "\n".join([*lines, f"| all | {self.sent} | {' | '.join(map(str, row))} |"])


def read_counters(metrics_port: int) -> dict[str, float]:
    """/metrics: name -> value of everything without buckets, summed over labels."""
    with urllib.request.urlopen(f"http://{HOST}:{metrics_port}/metrics", timeout=10) as response:
        text = response.read().decode()
    values: dict[str, float] = {}
    for name, number in re.findall(r"^(\w+?)(?:\{[^}]*\})? (\S+)$", text, re.MULTILINE):
        if not name.endswith("_bucket"):
            values[name] = values.get(name, 0.0) + float(number)
    return values


def disagreements(ledger: Ledger, before: Mapping[str, float], after: Mapping[str, float]) -> list[str]:
    """Where the server's counters of a period tell another story than the ledger of the same period.

    Spoilt requests may never reach a handler, and what we hung up on may have been finished before.
    """
    received, success, failed, cancelled = (
        int(after[f"{name}_total"] - before[f"{name}_total"])
        for name in ("request_received", "request_success", "request_failed", "mindie_request_cancelled")
    )
    spoilt = sum(ending.manner is Manner.SPOILS for ending in ledger.endings)
    late = sum(
        ending.manner is Manner.HANGS_UP and ending.fate is Fate.CANCELLED for ending in ledger.endings
    )
    unsure = spoilt + late
    finished = sum(
        ending.fate is Fate.FINISHED and ending.manner is not Manner.SPOILS for ending in ledger.endings
    )
    found = []
    if received != success + failed + cancelled:
        found.append(
            f"the server counts {received} received, but {success} succeeded, {failed} failed and "
            f"{cancelled} were cancelled"
        )
    if not ledger.sent - unsure <= received <= ledger.sent:
        found.append(f"{ledger.sent} were sent, {received} received")
    if not finished <= success <= finished + unsure:
        found.append(f"{finished} finished here, {success} succeeded there")
    if cancelled > unsure:
        found.append(f"{late} were cancelled here, {cancelled} there")
    return found


def percentile(values: Iterable[float], share: float) -> float:
    """Nearest rank; nan without values."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan
