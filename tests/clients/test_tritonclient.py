"""tritonclient over HTTP, unmodified: health and metadata, tokens in and tokens out, errors."""

from __future__ import annotations

import http.client
import json
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
from tokenizers import Tokenizer
from tritonclient.utils import InferenceServerException

from tests.harness import HOST, TINY_MODEL, Daemon, eventually

MODEL = "mindie-tiny"
PROMPT = "Once upon a time"
TOKENIZER = Tokenizer.from_file(str(TINY_MODEL / "tokenizer.json"))
IDS = TOKENIZER.encode(PROMPT).ids


@pytest.fixture(scope="module")
def client(server: Daemon) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(f"{HOST}:{server.port}", network_timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def management(server: Daemon) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(f"{HOST}:{server.management_port}") as client:
        yield client


def tensor(ids: list[int], *, binary: bool = False, shape: list[int] | None = None) -> triton.InferInput:
    data = np.array(ids, dtype=np.uint32).reshape(shape or [1, len(ids)])
    return triton.InferInput("INPUT0", list(data.shape), "UINT32").set_data_from_numpy(
        data, binary_data=binary
    )


def wanted(*, binary: bool = False) -> triton.InferRequestedOutput:
    return triton.InferRequestedOutput("OUTPUT0", binary_data=binary)


def infer(client: triton.InferenceServerClient, **changes: Any) -> triton.InferResult:
    arguments = {
        "model_name": MODEL,
        "inputs": [tensor(IDS)],
        "outputs": [wanted()],
        "parameters": {"max_new_tokens": 8},
    }
    return client.infer(**{**arguments, **changes})


def test_health(management: triton.InferenceServerClient) -> None:
    assert management.is_server_live() and management.is_server_ready()
    assert management.is_model_ready(MODEL)
    assert not management.is_model_ready("no-such-model")


def test_metadata_and_config(client: triton.InferenceServerClient) -> None:
    assert client.get_server_metadata()["name"]
    metadata = client.get_model_metadata(MODEL)
    assert metadata["name"] == MODEL
    assert metadata["inputs"][0]["datatype"] == metadata["outputs"][0]["datatype"] == "UINT32"
    config = client.get_model_config(MODEL)
    assert config["model_name"] == MODEL and config["max_seq_len"] > 0
    with pytest.raises(InferenceServerException, match="no model of this name") as caught:
        client.get_model_metadata("no-such-model")
    assert caught.value.status() == "404"


def test_infer(client: triton.InferenceServerClient) -> None:
    result = infer(client, request_id="tensor-1", priority=1, timeout=30)
    assert result.get_response()["id"] == "tensor-1"
    output = result.as_numpy("OUTPUT0")
    assert output.dtype == np.uint32 and output.shape == (1, 8)
    flat = infer(client, inputs=[tensor(IDS, shape=[len(IDS)])]).as_numpy("OUTPUT0")
    assert flat.tolist() == output.tolist()


def test_infer_says_what_completions_say(client: triton.InferenceServerClient, server: Daemon) -> None:
    ids = infer(client).as_numpy("OUTPUT0")[0].tolist()
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 8}
    assert TOKENIZER.decode(ids) == server.post("/v1/completions", body).json()["choices"][0]["text"]


def test_outputs_wanted_as_bytes_come_as_json(client: triton.InferenceServerClient) -> None:
    """What the client asks for unless told otherwise; it reads either form."""
    output = infer(client, outputs=[wanted(binary=True)]).as_numpy("OUTPUT0")
    assert output.tolist() == infer(client).as_numpy("OUTPUT0").tolist()


def test_async_infer(client: triton.InferenceServerClient) -> None:
    requests = [
        client.async_infer(MODEL, [tensor(IDS)], outputs=[wanted()], parameters={"max_new_tokens": count})
        for count in (1, 2, 3)
    ]
    lengths = [request.get_result().as_numpy("OUTPUT0").shape[1] for request in requests]
    assert lengths == [1, 2, 3]


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"inputs": [tensor(IDS, binary=True)]}, "binary"),
        ({"outputs": None}, "outputs"),
        ({"inputs": [tensor(IDS), tensor(IDS)]}, "inputs"),
        ({"parameters": {"temperature": -1.0}}, "temperature"),
        ({"request_id": "not an id"}, "id"),
        ({"model_name": "no-such-model"}, "no model of this name"),
    ],
)
def test_errors_have_status_and_text(
    client: triton.InferenceServerClient, changes: dict[str, Any], names: str
) -> None:
    with pytest.raises(InferenceServerException, match=names) as caught:
        infer(client, **changes)
    assert caught.value.status() == ("404" if "model_name" in changes else "422")


def test_stop_infer(server: Daemon, client: triton.InferenceServerClient) -> None:
    """The one request that tritonclient has no call for, sent as MindIE's client sends it: without a type."""
    name = uuid.uuid4().hex

    def stop() -> bool:
        connection = http.client.HTTPConnection(HOST, server.port, timeout=30)
        connection.request("POST", f"/v2/models/{MODEL}/stopInfer", json.dumps({"id": name}))
        answer = connection.getresponse()
        body = json.loads(answer.read())
        connection.close()
        assert (answer.status, body.get("id")) == (200, name) or answer.status == 404
        return answer.status == 200

    def endless() -> int:
        body = {"id": name, "text_input": "Once", "parameters": {"max_new_tokens": 512, "details": True}}
        answer = server.post(f"/v2/models/{MODEL}/generate", body).json()
        count: int = answer["details"]["generated_tokens"]
        assert answer["details"]["finish_reason"] == "stop_sequence"
        return count

    with ThreadPoolExecutor() as pool:
        running = pool.submit(endless)
        eventually(stop, 10.0, "the request is there to be stopped")
        assert running.result(30) < 512


def test_mutual_tls(https_server: Daemon) -> None:
    with triton.InferenceServerClient(
        f"{HOST}:{https_server.port}", ssl=True, ssl_context_factory=https_server.tls
    ) as client:
        assert infer(client, model_name="llama").as_numpy("OUTPUT0").shape == (1, 8)
