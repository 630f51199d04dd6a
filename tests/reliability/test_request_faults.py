"""What goes wrong with one request ends that request; the others of its batch go on."""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import psutil
import pytest
import torch
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from safetensors.torch import load_file, save_file

from endpoint.app import _answer, _errors
from endpoint.generation_stream import GenerationStream
from endpoint.protocols.base import GenerationRequest, Reply, TokenStep
from endpoint.protocols.mindie_native import NativeReply
from engine.errors import ServerError
from engine.executor import NO_TOKEN
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence as EngineSequence
from scripts.write_random_model import Shape, write_model
from tests.endpoint.samples import steps
from tests.harness import Daemon, Installation, Json, merge, model_config, sse_payloads
from worker.grammar import GrammarBook
from worker.sampler import Sampler

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
write_random_model = importlib.import_module("write_random_model")

SPOILT = 1500  # the token whose embedding holds no numbers
GOOD = [300, 301, 302]


# --- F19: logits that are no numbers -------------------------------------------------------------------


@pytest.fixture(scope="module")
def daemon(installation: Installation, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """Serves a model in which one token's embedding is NaN, hence everything after that token."""
    folder = tmp_path_factory.mktemp("spoilt") / "model"
    # in float32, where company in the batch does not tip a choice
    shape = write_random_model.SHAPES["llama-tiny"]
    write_random_model.write_model(shape, folder, seed=3, dtype="float32")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][SPOILT] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    # few blocks, so that the next request gets those in which the NaN lie
    changes = {
        "BackendConfig": {
            "ModelDeployConfig": {"maxSeqLen": 512, "maxInputTokenLen": 256},
            "runtimeConfig": {"kvCacheBlockNum": 8},
        }
    }
    daemon = installation.daemon(changes, model=folder).start().wait_ready()
    yield daemon
    assert daemon.stop() == 0, daemon.stderr


def completion(prompt: list[int], **more: Any) -> Json:
    return {
        "model": "mindie-tiny",
        "prompt": prompt,
        "max_tokens": 40,
        "temperature": 0,
        "ignore_eos": True,
        **more,
    }


def text(daemon: Daemon, **more: Any) -> str:
    answer = daemon.post("/v1/completions", completion(GOOD, **more))
    assert answer.status == 200, answer.body
    return str(answer.json()["choices"][0]["text"])


@pytest.mark.parametrize("more", [{}, {"temperature": 0.9, "seed": 4, "top_p": 0.9}, {"logprobs": 2}])
def test_F19_a_prompt_of_no_numbers_ends_with_an_error(daemon: Daemon, more: Json) -> None:
    answer = daemon.post("/v1/completions", completion([300, SPOILT, 301], **more))
    assert answer.status == 500
    assert "not numbers" in answer.json()["error"]


def test_F19_a_stream_that_comes_upon_no_numbers_ends_with_an_error_event(daemon: Daemon) -> None:
    """The first token is forced to be the spoilt one; what follows cannot be computed."""
    body = completion(GOOD, stream=True, logit_bias={str(SPOILT): 100})
    first, error, done = daemon.frames("/v1/completions", body)
    assert json.loads(first)["choices"][0]["finish_reason"] is None
    assert "not numbers" in json.loads(error)["error"]
    assert done == "[DONE]"


def test_F19_others_of_the_batch_and_later_owners_of_the_blocks_go_on(daemon: Daemon) -> None:
    alone = text(daemon)
    with ThreadPoolExecutor(8) as pool:
        spoilt = [
            pool.submit(daemon.post, "/v1/completions", completion([SPOILT] * 40, **more))
            for more in ({}, {"n": 2, "temperature": 1.0}, {"n": 2, "use_beam_search": True})
        ]
        whole = [pool.submit(text, daemon) for _ in range(4)]
        assert [future.result().status for future in spoilt] == [500] * 3
        assert [future.result() for future in whole] == [alone] * 4
    assert text(daemon) == alone
    metrics = daemon.request("GET", "/metrics", port=daemon.metrics_port).body.decode()
    failed = next(line for line in metrics.splitlines() if line.startswith("request_failed_total"))
    assert float(failed.split()[-1]) >= 3


# --- F18: out of memory in a step ----------------------------------------------------------------------


@pytest.mark.slow
def test_F18_a_step_without_memory_is_tried_row_by_row(
    make_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    """The kernel refuses the running worker more address space; what fits alone is served, the rest fails."""
    changes = {
        "BackendConfig": {
            "ModelDeployConfig": {"maxSeqLen": 4096, "maxInputTokenLen": 4000},
            # Mix, in pieces without end: several prompts share a step, however long they are
            "ScheduleConfig": {"maxPrefillTokens": 4096, "templateType": "Mix", "prefillChunkSize": 4096},
            "runtimeConfig": {"kvCacheBlockNum": 64},
        }
    }
    # few weights, and 192 KiB of intermediate results for each token
    write_model(Shape("llama", 1, 64, 4, 2, 32768, 2048, tied=False), tmp_path / "wide")
    model = model_config(
        plugin_params=json.dumps({"plugin_type": "splitfuse"}),
        modelName="mindie-tiny",
        modelWeightPath=str(tmp_path / "wide"),
    )
    daemon = make_daemon(merge(model, changes)).start().wait_ready()
    short, long = [300 + number % 500 for number in range(300)], [400] * 3900
    alone = daemon.post("/v1/completions", completion(short)).json()["choices"][0]["text"]
    worker = daemon.child("worker")
    before = worker.rlimit(psutil.RLIMIT_AS)
    # room for a prompt of 300 tokens, not for seven of them
    worker.rlimit(psutil.RLIMIT_AS, (worker.memory_info().vms + 128 * 2**20, before[1]))

    together = daemon.post("/v1/completions", {**completion(short), "prompt": [short] * 8})
    assert together.status == 200, together.body
    assert [choice["text"] for choice in together.json()["choices"]] == [alone] * 8
    assert "out of memory in a step of" in daemon.stderr
    refused = daemon.post("/v1/completions", completion(long))
    assert refused.status == 500 and "no memory" in refused.json()["error"]
    assert daemon.post("/v1/completions", completion(short)).json()["choices"][0]["text"] == alone

    worker.rlimit(psutil.RLIMIT_AS, before)
    assert daemon.post("/v1/completions", completion(short)).json()["choices"][0]["text"] == alone
    assert worker.is_running()


# --- F20: an exception over one request ----------------------------------------------------------------


class BrokenBook:
    """Masks for everybody but the sequence with this id."""

    def __init__(self, broken: int) -> None:
        self._broken = broken

    def expect(self, sequences: Sequence[EngineSequence]) -> None: ...

    def collect(self, sequences: Sequence[EngineSequence], *, alone: bool) -> None: ...

    def legal(self, sequence: EngineSequence) -> Any:
        if sequence.request_id == self._broken:
            raise KeyError("no state of this grammar")
        return np.arange(20) == 7


def test_F20_an_exception_in_sampling_or_a_grammar_ends_that_request_only(
    caplog: pytest.LogCaptureFixture,
) -> None:
    sampled = SamplingParams(max_tokens=4, temperature=0.7, seed=1)
    asked = [
        sampled,
        replace(sampled, grammar="{}"),
        replace(sampled, grammar="{}"),
        SamplingParams(max_tokens=4),
    ]
    rows = [EngineSequence(number, np.array([1], np.int32), params) for number, params in enumerate(asked)]
    torch.manual_seed(1)
    logits = torch.randn(4, 20)
    tokens = Sampler(20, (), cast(GrammarBook, BrokenBook(2))).sample(logits, rows)
    assert tokens.tolist()[1:] == [7, NO_TOKEN, int(logits[3].argmax())]
    assert tokens[0] >= 0
    assert "request 2 cannot be sampled" in caplog.text


class FailingReply(NativeReply):
    """Fails over what the model wrote: at a frame, or when the stream is to be ended."""

    where = ""

    def frame(self, step: TokenStep) -> bytes:
        if step.text == self.where:
            raise IndexError("a parser at its end")
        return super().frame(step)

    def tail(self) -> Sequence[bytes]:
        if self.where == "tail":
            raise IndexError("a parser at its end")
        return super().tail()

    def error_frames(self, error: ServerError) -> Sequence[bytes]:
        return [b"data: error\n\n"]


@pytest.mark.parametrize("where", ["b", "tail"])
def test_F20_a_stream_whose_text_cannot_be_taken_apart_ends_with_an_error_event(where: str) -> None:
    async def handle(http: web.Request) -> web.StreamResponse:
        async def stream() -> AsyncIterator[TokenStep]:
            for step in steps(["a", "b", "c"]):
                yield step

        request = GenerationRequest("", SamplingParams(8), stream=True)
        reply = FailingReply(1, False, False)
        reply.where = where
        return await _answer(http, "id", request, cast(GenerationStream, stream()), cast(Reply, reply))

    async def run() -> str:
        app = web.Application(middlewares=[_errors])
        app.add_routes([web.get("/", handle)])
        async with TestClient(TestServer(app)) as client:
            return (await (await client.get("/")).read()).decode()

    frames = sse_payloads(asyncio.run(asyncio.wait_for(run(), 30)).encode())
    assert frames[-1] == "error"
    assert len(frames) == (2 if where == "b" else 4)
