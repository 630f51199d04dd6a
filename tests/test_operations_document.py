"""The tables of docs/operations.md are complete: keys of runtimeConfig, metrics, exit codes."""

from __future__ import annotations

import json
import re
from typing import get_args

from prometheus_client.parser import text_string_to_metric_families

from daemon.config_schema import RUNTIME, SECTIONS
from daemon.reload import HOT_KEYS
from endpoint.connection_metrics import Closed, Failure
from endpoint.metrics import Metrics
from engine import errors
from tests.harness import REPO

DOCUMENT = (REPO / "docs" / "operations.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return DOCUMENT.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_every_key_of_runtime_config_stands_there_as_it_is_checked() -> None:
    (runtime,) = (each for each in SECTIONS if each.path == RUNTIME)
    rows = {}
    for line in section("Keys of runtimeConfig").splitlines():
        if line.startswith("| `"):
            name, allowed, default, hot, meaning = (cell.strip() for cell in line.strip("|").split("|"))
            rows[name.strip("`")] = (allowed, default, hot)
            assert meaning
    expected = {}
    for key in runtime.keys:
        default = key.default if isinstance(key.default, str) and key.default else json.dumps(key.default)
        allowed = "true, false" if key.kind == "bool" else key.permitted().replace('"', "")
        hot = "yes" if f"{RUNTIME}.{key.name}" in HOT_KEYS else "no"
        expected[key.name] = (allowed, default, hot)
    assert rows == expected


def test_every_metric_has_its_meaning() -> None:
    rows = re.findall(r"^\| (`.+`) \| (counter|gauge|histogram) \| .+ \|$", section("Metrics"), re.MULTILINE)
    told = {name: kind for names, kind in rows for name in re.findall(r"`(\w+)`", names)}
    families = text_string_to_metric_families(Metrics("m", 10, lambda: ()).exposition().decode())
    real = {each.name + ("_total" if each.type == "counter" else ""): each.type for each in families}
    assert told == real
    assert all(f"`{cause}`" in section("Metrics") for cause in (*get_args(Closed), *get_args(Failure)))


def test_every_exit_code_has_its_cause() -> None:
    codes = {value for name, value in vars(errors).items() if name.startswith("EXIT_")}
    assert set(map(int, re.findall(r"^\| (\d+) \|", section("Stop"), re.MULTILINE))) == codes
