"""/metrics and /metrics-json of the running daemon: names, buckets, and sums that add up."""

from __future__ import annotations

import threading
from collections.abc import Callable

from prometheus_client.parser import text_string_to_metric_families

from tests.harness import Daemon, eventually

MakeDaemon = Callable[..., Daemon]
COMPLETION = {"model": "mindie-tiny", "prompt": "Once upon a time", "max_tokens": 12, "ignore_eos": True}
COUNTERS = {
    "request_received_total", "request_success_total", "request_failed_total", "num_preemptions_total",
    "prompt_tokens_total", "generation_tokens_total",
}  # fmt: skip
GAUGES = {
    "num_requests_running", "num_requests_waiting", "num_requests_swapped", "failed_request_perc",
    "avg_prompt_throughput_toks_per_s", "avg_generation_throughput_toks_per_s", "npu_cache_usage_perc",
    "cpu_cache_usage_perc", "npu_prefix_cache_hit_rate", "all_radix_match_num", "npu_radix_match_hit_num",
}  # fmt: skip
BUCKETS = {
    "time_to_first_token_seconds": "0.001 0.005 0.01 0.02 0.04 0.06 0.08 0.1 0.25 0.5 0.75 1.0 2.5 5.0 "
    "7.5 10.0",
    "time_per_output_token_seconds": "0.01 0.025 0.05 0.075 0.1 0.15 0.2 0.3 0.4 0.5 0.75 1.0 2.5",
    "e2e_request_latency_seconds": "1.0 2.5 5.0 10.0 15.0 20.0 30.0 40.0 50.0 60.0",
    **dict.fromkeys(
        ("request_prompt_tokens", "request_generation_tokens"),
        "10.0 50.0 100.0 200.0 500.0 1000.0 2000.0 5000.0 10000.0 16000.0 20000.0 32000.0 50000.0 64000.0 "
        "128000.0",
    ),
}


def scrape(daemon: Daemon, key: str = "") -> dict[str, float]:
    """Every sample without labels but the model's; histograms by their _count and _sum."""
    headers = {"x-api-key": key} if key else {}
    answer = daemon.request("GET", "/metrics", port=daemon.metrics_port, headers=headers)
    assert answer.status == 200 and answer.headers["content-type"].startswith("text/plain")
    samples = {}
    for family in text_string_to_metric_families(answer.body.decode()):
        for sample in family.samples:
            assert sample.labels["model_name"] == "mindie-tiny"
            samples[sample.name + sample.labels.get("le", "")] = sample.value
    return samples


def test_every_name_and_bucket_is_there_from_the_start(make_daemon: MakeDaemon) -> None:
    samples = scrape(make_daemon().start().wait_ready())
    assert set(samples) >= COUNTERS | GAUGES
    assert not [name for name in samples if name.endswith("_created")]
    for name, bounds in BUCKETS.items():
        buckets = [key.removeprefix(f"{name}_bucket") for key in samples if key.startswith(f"{name}_bucket")]
        assert buckets == [*bounds.split(), "+Inf"]
        assert {f"{name}_count", f"{name}_sum"} <= set(samples)


def test_sums_add_up_and_idle_means_empty(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon().start().wait_ready()
    threads = [threading.Thread(target=daemon.post, args=("/v1/completions", COMPLETION)) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    daemon.frames("/v1/completions", {**COMPLETION, "stream": True, "n": 2, "temperature": 1.0})
    assert daemon.post("/v1/completions", {**COMPLETION, "max_tokens": 0}).status == 422
    assert daemon.post("/v1/completions", b"no json").status == 422
    samples = scrape(daemon)
    assert samples["request_received_total"] == 13
    assert samples["request_success_total"] == 11 and samples["request_failed_total"] == 2
    assert samples["failed_request_perc"] == 2 / 13
    assert samples["generation_tokens_total"] == 10 * 12 + 24
    assert samples["prompt_tokens_total"] == samples["request_prompt_tokens_sum"] == 11 * 4
    assert samples["time_to_first_token_seconds_count"] == samples["e2e_request_latency_seconds_count"] == 11
    assert samples["time_per_output_token_seconds_count"] == 10 * 11 + 2 * 11  # gaps inside of each choice
    assert samples["request_generation_tokens_sum"] == 10 * 12 + 24

    def empty() -> bool:
        now = scrape(daemon)
        return not (now["num_requests_running"] or now["num_requests_waiting"] or now["npu_cache_usage_perc"])

    eventually(empty, 5.0, "an idle engine holds nothing")


def test_the_json_form_has_its_five_values(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon().start().wait_ready()
    daemon.post("/v1/completions", COMPLETION)
    body = daemon.manage("/metrics-json").json()
    assert body["resultType"] == "vector"
    named = {entry["metric"][0]["__name__"]: entry for entry in body["result"]}
    names = ["TTFT", "TBT", "waitingInferRequestNum", "processingInferRequestNum", "remainBlocks"]
    assert list(named) == names
    assert all(isinstance(entry["value"], str) for entry in named.values())
    assert int(named["TTFT"]["value"]) > 0 and int(named["remainBlocks"]["value"]) > 0
    assert named["TTFT"]["metric"][0]["instance"] == f"127.0.0.1:{daemon.management_port}"


def test_metrics_can_be_switched_off(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon()
    daemon.environ["MIES_SERVICE_MONITOR_MODE"] = "0"
    daemon.start().wait_ready()
    answer = daemon.request("GET", "/metrics", port=daemon.metrics_port)
    assert answer.status == 500 and "MIES_SERVICE_MONITOR_MODE" in answer.json()["error"]
