"""Everything that could grow has a limit and a gauge, and an idle daemon holds nothing (P2, P1, F13)."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable

from prometheus_client.parser import text_string_to_metric_families

from tests.harness import TINY_MODEL, Daemon, Json, eventually, model_config

MakeDaemon = Callable[..., Daemon]
ALWAYS_THERE = {
    "grammar_cache_bytes", "grammar_trials", "kv_blocks", "prompt_ring", "requests_running",
    "requests_waiting", "token_ring", "tokenizer_queue",
}  # fmt: skip
KEPT_WHEN_IDLE = {"grammar_cache_bytes", "adapters", "connections"}
TOKENS = 900_000  # tens of seconds of an echo


def daemon_of_one_place(make_daemon: MakeDaemon) -> Daemon:
    config = model_config(
        modelName="mindie-tiny", modelWeightPath=str(TINY_MODEL), modelInstanceType="StandardMock"
    )
    config["BackendConfig"]["ScheduleConfig"] = {"maxIterTimes": TOKENS}
    config["BackendConfig"]["ModelDeployConfig"]["maxSeqLen"] = TOKENS + 1000
    return make_daemon({**config, "ServerConfig": {"maxLinkNum": 1}}).start().wait_ready()


def samples(daemon: Daemon) -> dict[str, float]:
    """By name, and by name and bound."""
    text = daemon.request("GET", "/metrics", port=daemon.metrics_port).body.decode()
    return {
        " ".join(filter(None, (sample.name, sample.labels.get("bound")))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def bounds(daemon: Daemon) -> dict[str, tuple[float, float]]:
    """bound -> used, limit"""
    found = samples(daemon)
    names = [name.split()[1] for name in found if name.startswith("mindie_bound_used ")]
    return {name: (found[f"mindie_bound_used {name}"], found[f"mindie_bound_limit {name}"]) for name in names}


def completion(max_tokens: int) -> Json:
    return {"model": "mindie-tiny", "prompt": "Hi", "max_tokens": max_tokens, "ignore_eos": True}


def adds_up(found: dict[str, float]) -> bool:
    ends = ("request_success_total", "request_failed_total", "mindie_request_cancelled_total")
    in_flight = found["mindie_requests_in_flight"]
    return found["request_received_total"] == sum(found[name] for name in ends) + in_flight


def test_P1_P2_F13_every_bound_is_kept_under_load_and_nothing_is_held_after_it(
    make_daemon: MakeDaemon,
) -> None:
    daemon = daemon_of_one_place(make_daemon)
    idle = bounds(daemon)
    assert idle.keys() >= ALWAYS_THERE
    for name, (used, limit) in idle.items():
        assert limit > 0 and 0 <= used <= limit, name
        assert not used or name in KEPT_WHEN_IDLE, name

    with contextlib.ExitStack() as stack:
        for _ in range(6):  # one runs, two wait, the others are refused
            connection = stack.enter_context(contextlib.closing(daemon.connect()))
            connection.request("POST", "/v1/completions", json.dumps(completion(TOKENS)).encode())
        eventually(lambda: samples(daemon)["request_failed_total"] == 3, 10.0, "three refusals")
        eventually(lambda: bounds(daemon)["kv_blocks"][0] > 0, 10.0, "the engine tells that one runs")
        loaded = bounds(daemon)
        assert loaded["requests_running"] == (1, 1) and loaded["requests_waiting"] == (2, 2)
        for name, (used, limit) in loaded.items():
            assert 0 <= used <= limit, name
        found = samples(daemon)
        assert found["mindie_requests_in_flight"] == 3 and adds_up(found)

    def idle_again() -> bool:
        return not any(used for name, (used, _) in bounds(daemon).items() if name not in KEPT_WHEN_IDLE)

    eventually(idle_again, 10.0, "nothing is held for clients that have hung up")
    assert daemon.post("/v1/completions", completion(1)).status == 200
    found = samples(daemon)
    assert found["mindie_request_cancelled_total"] == 3  # no errors
    assert found["request_failed_total"] == 3 and found["request_success_total"] == 1
    assert found["mindie_requests_in_flight"] == 0 and adds_up(found)
    assert found["npu_cache_usage_perc"] == 0
