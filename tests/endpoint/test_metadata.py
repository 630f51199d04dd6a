"""Bodies that describe the server, and the token count."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from endpoint import metadata
from endpoint.metadata import Occupancy
from endpoint.token_count import count_tokens, parse_count
from endpoint.tokenizer import TokenizerPool
from engine.errors import InvalidRequest, NotFound
from engine.settings import ModelSettings, ScheduleSettings
from tests.endpoint import tiny_tokenizers
from tests.endpoint.samples import model_info

SCHEDULE = ScheduleSettings(
    block_size=128, max_prefill_batch_size=50, max_prefill_tokens=8192, max_batch_size=200,
    max_iter_times=512, max_queue_delay_us=5000, max_first_token_wait_ms=2500, max_n=50, max_seq_len=2560,
    max_input_len=2048,    truncation="off",
)  # fmt: skip
MODEL = ModelSettings(
    name="llama", weight_path=Path("/data/secret/llama-7b"), instance_type="Standard", device_type="cpu",
    dtype="auto", kv_cache_gib=-1, kv_cache_mib=0, kv_block_num=0, memory_fraction=0.8, cpu_threads=0,
    trust_remote_code=False, ignore_eos=False, world_size=4, cpu_mem_gib=5,
)  # fmt: skip
IDLE = [Occupancy(0, 0, 0, 1024, 1024)]
BUSY = [Occupancy(3, 2, 1, 100, 1024), Occupancy(200, 7, 0, 0, 1024)]


def test_the_server() -> None:
    assert json.loads(metadata.server_metadata(SCHEDULE)) == {
        "name": "MindIE Server",
        "version": "1.0.0",
        "extensions": {
            "max_iter_times": 512,
            "prefill_policy_type": 0,
            "decode_policy_type": 0,
            "max_prefill_batch_size": 50,
            "max_prefill_tokens": 8192,
        },
    }


def test_the_model() -> None:
    assert json.loads(metadata.model_metadata(model_info(), "llama")) == {
        "name": "llama",
        "platform": "MindIE Server",
        "inputs": [{"name": "input0", "shape": [-1], "datatype": "UINT32"}],
        "outputs": [{"name": "output0", "shape": [-1], "datatype": "UINT32"}],
    }
    assert json.loads(metadata.model_config(model_info(), MODEL, "llama")) == {
        "model_name": "llama",
        "input_datatype": "UINT32",
        "output_datatype": "UINT32",
        "max_seq_len": 2560,
        "npu_mem_size": -1,
        "cpu_mem_size": 5,
        "world_size": 4,
        "model_weight_path": "llama-7b",
        "model_instance_type": "Standard",
    }


def test_unknown_models() -> None:
    for ask in (
        lambda: metadata.model_metadata(model_info(), "other"),
        lambda: metadata.model_config(model_info(), MODEL, "other"),
        lambda: metadata.slot_count(model_info(), "other", IDLE, 200, 128),
    ):
        with pytest.raises(NotFound):
            ask()


def test_the_configuration() -> None:
    assert json.loads(metadata.server_config(model_info(), MODEL, 128)) == {
        "modelName": "llama",
        "maxSeqLen": 2560,
        "npuMemSize": -1,
        "cpuMemSize": 5,
        "worldSize": 4,
        "maxOutputLen": 512,
        "cacheBlockSize": 128,
    }


def test_info() -> None:
    info = json.loads(metadata.tgi_info(model_info(), "cpu", "bfloat16", 1000, 128, 1024))
    assert {
        "docker_label", "max_batch_total_tokens", "max_best_of", "max_concurrent_requests",
        "max_stop_sequences", "max_waiting_tokens", "sha", "validation_workers", "version",
        "waiting_served_ratio", "models", "max_input_length",
    } <= info.keys()  # fmt: skip
    assert info["max_batch_total_tokens"] == 131_072 and info["max_input_length"] == 2048
    assert info["models"] == [
        {
            "model_device_type": "cpu",
            "model_dtype": "bfloat16",
            "model_id": "llama",
            "model_pipeline_tag": "text-generation",
            "model_sha": None,
            "max_total_tokens": 2560,
        }
    ]


def test_slots() -> None:
    assert json.loads(metadata.slot_count(model_info(), "llama", IDLE, 200, 128)) == {
        "total_slots": 200,
        "free_slots": 200,
        "available_tokens_length": 131_072,
    }
    busy = json.loads(metadata.slot_count(model_info(), "llama", BUSY, 200, 128))
    assert busy == {"total_slots": 400, "free_slots": 197, "available_tokens_length": 12_800}


def test_status() -> None:
    assert metadata.status(IDLE, 200) == {
        "service": {"roleStatus": "RoleReady", "currentRole": "none"},
        "resource": {
            "availSlotsNum": 200,
            "availBlockNum": 1024,
            "waitingRequestNum": 0,
            "runningRequestNum": 0,
            "swappedRequestNum": 0,
            "freeNpuBlockNums": 1024,
            "freeCpuBlockNums": 0,
            "totalNpuBlockNums": 1024,
            "totalCpuBlockNums": 0,
        },
        "linkStatus": {"peers": []},
    }
    old, new = metadata.status(BUSY, 200)["resource"], metadata.status_v2(BUSY, 200)["resource"]
    assert old["runningRequestNum"] == 203 and old["waitingRequestNum"] == 9 and old["availSlotsNum"] == 197
    assert new == {
        **old,
        "totalAvailNpuSlotsNum": 197,
        "totalAvailNpuBlockNum": 100,
        "maxAvailNpuBlockNum": 100,
        "dpInstMap": {},
    }


# -- token count -------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["byte_level", "sentencepiece"])
def pool(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TokenizerPool:
    family = getattr(tiny_tokenizers, request.param)()
    return TokenizerPool(tiny_tokenizers.save(family, tmp_path_factory.mktemp(request.param)), threads=1)


@pytest.mark.parametrize("inputs", [None, "", 5, [], ["a"], {}, True])
def test_only_a_text_can_be_counted(inputs: object) -> None:
    with pytest.raises(InvalidRequest, match="`inputs`"):
        parse_count({"inputs": inputs})
    for wrong in (1, "true"):
        with pytest.raises(InvalidRequest, match="`do_decode`"):
            parse_count({"inputs": "a", "do_decode": wrong})


@given(text=st.text(st.sampled_from("hello wrd\n你好😀é"), min_size=1, max_size=30))
def test_the_count_is_that_of_a_prompt_and_the_tokens_join_to_the_text(
    pool: TokenizerPool, text: str
) -> None:
    answer = json.loads(count_tokens(pool, parse_count({"inputs": text})))
    assert answer["token_number"] == len(pool.encode(text)) >= len(answer["tokens"])
    assert "".join(answer["tokens"]) == pool.decode(pool.encode(text)) and "" not in answer["tokens"]
    assert json.loads(count_tokens(pool, parse_count({"inputs": text, "do_decode": False}))) == {
        "token_number": answer["token_number"],
        "tokens": [],
    }


def test_a_text_of_more_tokens_than_a_prompt_may_have(
    pool: TokenizerPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "encode", lambda _: [5] * 1_048_577)
    with pytest.raises(InvalidRequest, match="1048576"):
        count_tokens(pool, parse_count({"inputs": "a"}))
