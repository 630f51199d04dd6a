"""What becomes of a request is counted once; bounds and certificates are read when somebody asks."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import get_args

import pytest
from prometheus_client.parser import text_string_to_metric_families

from endpoint.bounds import BoundName, Bounds
from endpoint.metadata import Occupancy
from endpoint.metrics import Metrics
from engine.errors import EngineBug, ServiceUnavailable

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "operations.md"
ROW = re.compile(r"\| `(\w+)` \| (.+) \| (.+) \| (.+) \|")


def samples(metrics: Metrics) -> dict[tuple[str, ...], float]:
    """By name and labels but the model's."""
    found = {}
    for family in text_string_to_metric_families(metrics.exposition().decode()):
        for sample in family.samples:
            labels = {**sample.labels}
            assert labels.pop("model_name") == "m"
            found[(sample.name, *labels.values())] = sample.value
    return found


def test_every_request_ends_in_one_way() -> None:
    metrics = Metrics("m", 10, lambda: ())
    with metrics.request() as outcome:
        outcome.ok = True
    with metrics.request():
        pass  # an error was written into its stream
    for error in (ServiceUnavailable("full"), asyncio.CancelledError(), ConnectionResetError()):
        with pytest.raises(type(error)), metrics.request():
            raise error
    with metrics.request():
        found = samples(metrics)
    assert found["request_received_total",] == 6
    assert found["request_success_total",] == 1 and found["request_failed_total",] == 2
    assert found["mindie_request_cancelled_total",] == 2 and found["mindie_requests_in_flight",] == 1
    assert found["failed_request_perc",] == 2 / 6
    assert found["e2e_request_latency_seconds_count",] == 1


def test_bounds_are_read_when_somebody_asks() -> None:
    metrics = Metrics("m", 10, lambda: ())
    now = {"used": 3.0, "limit": 8.0, "refused": 0.0}
    metrics.bounds.register("connections", lambda: now["used"], lambda: now["limit"], lambda: now["refused"])
    metrics.bounds.register("log_queue", lambda: 0, 100)
    found = samples(metrics)
    assert found["mindie_bound_used", "connections"] == 3 and found["mindie_bound_limit", "connections"] == 8
    assert found["mindie_bound_limit", "log_queue"] == 100
    assert found["mindie_bound_refused_total", "connections"] == 0
    assert ("mindie_bound_refused_total", "log_queue") not in found
    now.update(used=8.0, limit=9.0, refused=2.0)
    found = samples(metrics)
    assert found["mindie_bound_used", "connections"] == 8 and found["mindie_bound_limit", "connections"] == 9
    assert found["mindie_bound_refused_total", "connections"] == 2


def test_a_bound_has_one_owner() -> None:
    bounds = Bounds()
    bounds.register("connections", lambda: 0, 1)
    with pytest.raises(EngineBug, match="connections"):
        bounds.register("connections", lambda: 0, 1)


def test_preemptions_never_go_back_when_an_instance_is_replaced() -> None:
    now = [Occupancy(0, 0, 0, 9, 9, preemptions=5), Occupancy(0, 0, 0, 9, 9, preemptions=2)]
    metrics = Metrics("m", 10, lambda: now)
    assert samples(metrics)["num_preemptions_total",] == 7
    now[0] = Occupancy(0, 0, 0, 0, 0, preemptions=0)  # it is dead
    assert samples(metrics)["num_preemptions_total",] == 7
    now[:] = [Occupancy(0, 0, 0, 9, 9, preemptions=1), Occupancy(0, 0, 0, 9, 9, preemptions=3)]
    assert samples(metrics)["num_preemptions_total",] == 9


def test_the_hit_rate_is_of_all_prompt_tokens_looked_up() -> None:
    now = [Occupancy(0, 0, 0, 9, 9, 0, 300, 100)]
    metrics = Metrics("m", 10, lambda: now)
    assert samples(metrics)["npu_prefix_cache_hit_rate",] == 1 / 3
    assert samples(metrics)["cpu_cache_usage_perc",] == 0
    # another one in its place
    now[0] = Occupancy(0, 0, 2, 9, 9, 0, 100, 40, host_blocks=8, free_host_blocks=6)
    found = samples(metrics)
    assert (found["all_radix_match_num",], found["npu_radix_match_hit_num",]) == (400, 140)
    assert (found["num_requests_swapped",], found["cpu_cache_usage_perc",]) == (2, 0.25)
    assert found["npu_prefix_cache_hit_rate",] == 0.35


def test_certificates_tell_their_days() -> None:
    metrics = Metrics("m", 10, lambda: ())
    metrics.watch_certificate("business", lambda: 29.5)
    metrics.watch_certificate("management", lambda: -1.0)
    found = samples(metrics)
    assert found["mindie_certificate_expiry_days", "business"] == 29.5
    assert found["mindie_certificate_expiry_days", "management"] == -1.0


def test_P2_every_bound_has_its_row_for_operators() -> None:
    _, _, after = DOCUMENT.read_text(encoding="utf-8").partition("What happens when it is full |")
    section, _, _ = after.partition("\n## ")
    rows = {name: cells for name, *cells in ROW.findall(section)}
    assert rows.keys() == set(get_args(BoundName))
    assert all(cell.strip() for cells in rows.values() for cell in cells)
