"""Bodies that describe the server, its model and its load, in the words of Triton, TGI and MindIE."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from endpoint import sse
from endpoint.models_api import check_served
from endpoint.protocols.base import ModelInfo
from engine.settings import ModelSettings, ScheduleSettings

SERVER_NAME = "MindIE Server"
SERVER_VERSION = "1.0.0"
_DATATYPE = "UINT32"
_MAX_BEST_OF = 128
_MAX_STOPS = 1024


@dataclass(frozen=True, slots=True)
class Occupancy:
    """One model instance at one moment."""

    running: int
    waiting: int
    swapped: int
    free_blocks: int
    total_blocks: int
    preemptions: int = 0  # since start, as the next two
    prefix_tokens: int = 0  # of prompts, looked up in the prefix cache
    prefix_hits: int = 0  # of them, found there
    guessed_tokens: int = 0  # by speculative decoding
    right_guesses: int = 0  # of them, what the model said
    host_blocks: int = 0  # where swapped requests keep theirs; of now, as the first ones
    free_host_blocks: int = 0


def server_metadata(schedule: ScheduleSettings, prefill_policy: int = 0, decode_policy: int = 0) -> bytes:
    """GET /v2."""
    extensions = {
        "max_iter_times": schedule.max_iter_times,
        "prefill_policy_type": prefill_policy,
        "decode_policy_type": decode_policy,
        "max_prefill_batch_size": schedule.max_prefill_batch_size,
        "max_prefill_tokens": schedule.max_prefill_tokens,
    }
    return _json({"name": SERVER_NAME, "version": SERVER_VERSION, "extensions": extensions})


def model_metadata(info: ModelInfo, name: str) -> bytes:
    """GET /v2/models/{name}. Raises NotFound."""
    check_served(info, name)
    return _json(
        {
            "name": info.name,
            "platform": SERVER_NAME,
            "inputs": [{"name": "input0", "shape": [-1], "datatype": _DATATYPE}],
            "outputs": [{"name": "output0", "shape": [-1], "datatype": _DATATYPE}],
        }
    )


def model_config(info: ModelInfo, model: ModelSettings, name: str) -> bytes:
    """GET /v2/models/{name}/config. Raises NotFound."""
    check_served(info, name)
    return _json(
        {
            "model_name": info.name,
            "input_datatype": _DATATYPE,
            "output_datatype": _DATATYPE,
            "max_seq_len": info.max_seq_len,
            "npu_mem_size": model.kv_cache_gib,
            "cpu_mem_size": model.cpu_mem_gib,
            "world_size": model.world_size,
            "model_weight_path": model.weight_path.name,  # where it lies is nobody's business
            "model_instance_type": model.instance_type,
        }
    )


def server_config(info: ModelInfo, model: ModelSettings, block_size: int) -> bytes:
    """GET /v1/config."""
    return _json(
        {
            "modelName": info.name,
            "maxSeqLen": info.max_seq_len,
            "npuMemSize": model.kv_cache_gib,
            "cpuMemSize": model.cpu_mem_gib,
            "worldSize": model.world_size,
            "maxOutputLen": info.max_iter_times,
            "cacheBlockSize": block_size,
        }
    )


def tgi_info(
    info: ModelInfo, device: str, dtype: str, max_requests: int, block_size: int, total_blocks: int
) -> bytes:
    """GET /info. `device`: npu, cuda or cpu; `max_requests`: served at once; `total_blocks`: in all."""
    model = {
        "model_device_type": device,
        "model_dtype": dtype,
        "model_id": info.name,
        "model_pipeline_tag": "text-generation",
        "model_sha": None,
        "max_total_tokens": info.max_seq_len,
    }
    return _json(
        {
            "docker_label": None,
            "max_batch_total_tokens": total_blocks * block_size,
            "max_best_of": _MAX_BEST_OF,
            "max_concurrent_requests": max_requests,
            "max_stop_sequences": _MAX_STOPS,
            "max_waiting_tokens": None,
            "sha": None,
            "validation_workers": None,
            "version": SERVER_VERSION,
            "waiting_served_ratio": None,
            "models": [model],
            "max_input_length": info.max_prompt_tokens,
            "model_id": info.name,
            "max_input_tokens": info.max_prompt_tokens,
            "max_total_tokens": info.max_seq_len,
        }
    )


def slot_count(
    info: ModelInfo, name: str, instances: Sequence[Occupancy], max_batch_size: int, block_size: int
) -> bytes:
    """GET /v2/models/{name}/getSlotCount; `max_batch_size`: sequences of one instance. Raises NotFound."""
    check_served(info, name)
    return _json(
        {
            "total_slots": max_batch_size * len(instances),
            "free_slots": sum(_free_slots(instance, max_batch_size) for instance in instances),
            "available_tokens_length": sum(instance.free_blocks for instance in instances) * block_size,
        }
    )


def status(instances: Sequence[Occupancy], max_batch_size: int) -> dict[str, Any]:
    """GET /v1/status; `max_batch_size`: sequences of one instance."""
    free_blocks = sum(instance.free_blocks for instance in instances)
    return {
        "service": {"roleStatus": "RoleReady", "currentRole": "none"},
        "resource": {
            "availSlotsNum": sum(_free_slots(instance, max_batch_size) for instance in instances),
            "availBlockNum": free_blocks,
            "waitingRequestNum": sum(instance.waiting for instance in instances),
            "runningRequestNum": sum(instance.running for instance in instances),
            "swappedRequestNum": sum(instance.swapped for instance in instances),
            "freeNpuBlockNums": free_blocks,
            "freeCpuBlockNums": 0,
            "totalNpuBlockNums": sum(instance.total_blocks for instance in instances),
            "totalCpuBlockNums": 0,
        },
        "linkStatus": {"peers": []},
    }


def status_v2(instances: Sequence[Occupancy], max_batch_size: int) -> dict[str, Any]:
    """GET /v2/status: as /v1/status, and more on the instances."""
    answer = status(instances, max_batch_size)
    resource = answer["resource"]
    resource |= {
        "totalAvailNpuSlotsNum": resource["availSlotsNum"],
        "totalAvailNpuBlockNum": resource["availBlockNum"],
        "maxAvailNpuBlockNum": max((instance.free_blocks for instance in instances), default=0),
        "dpInstMap": {},
    }
    return answer


def _free_slots(instance: Occupancy, max_batch_size: int) -> int:
    # waiting requests do not count: they have no slot yet
    return max(0, max_batch_size - instance.running)


def _json(body: dict[str, Any]) -> bytes:
    return sse.dumps(body).encode()
