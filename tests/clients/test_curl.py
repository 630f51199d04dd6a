"""The commands of the manual's quick start, run by a shell as they are printed there.

Only the port is another one, and one name of a model: the page uses two, and a server serves one.
"""

from __future__ import annotations

import json
import re
import subprocess

from tests.harness import Daemon, Json

MODELS = (
    'curl -H "Accept: application/json" -H "Content-type: application/json" --cacert ca.pem --cert client.pem'
    "  --key client.key.pem -X GET https://127.0.0.1:1025/v1/models"
)
CHAT = """\
curl -H "Accept: application/json" -H "Content-type: application/json" --cacert ca.pem --cert client.pem  \
--key client.key.pem -X POST -d '{
    "model": "llama",
    "messages": [
        {
            "role": "user",
            "content": "You are a helpful assistant."
        }
    ],
    "stream": true,
    "presence_penalty": 1.03,
    "frequency_penalty": 1.0,
    "repetition_penalty": 1.0,
    "temperature": 0.5,
    "top_p": 0.95,
    "top_k": 1,
    "seed": 1,
    "max_tokens": 5,
    "n": 2,
    "best_of": 2
}' https://127.0.0.1:1025/v1/chat/completions"""
COMPLETIONS = """\
curl -H "Accept: application/json" -H "Content-type: application/json" --cacert ca.pem --cert client.pem  \
--key client.key.pem -X POST -d '{
    "model": "Qwen2.5-7B-Instruct",
    "prompt": "who are you",
    "temperature": 1,
    "max_tokens": 5,
    "use_beam_search": true,
    "ignore_eos":true,
    "n": 2,
    "best_of":2,
    "stream": true,
    "logprobs": 2
}' https://127.0.0.1:1025/v1/completions"""
INFER = """\
curl -H "Accept: application/json" -H "Content-type: application/json" --cacert ca.pem --cert client.pem  \
--key client.key.pem -X POST -d '{
    "inputs": "My name is Olivier and I",
    "stream": false,
    "parameters": {
        "temperature": 0.5,
        "top_k": 10,
        "top_p": 0.95,
        "max_new_tokens": 20,
        "do_sample": true,
        "seed": null,
        "repetition_penalty": 1.03,
        "details": true,
        "typical_p": 0.5,
        "watermark": false,
        "priority": 5,
        "timeout": 10
    }
}' https://127.0.0.1:1025/infer"""
INFER_STREAM = INFER.replace('"stream": false', '"stream": true')


def run(server: Daemon, command: str) -> str:
    command = command.replace(":1025/", f":{server.port}/").replace("Qwen2.5-7B-Instruct", "llama")
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=server.client_dir,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_models(https_server: Daemon) -> None:
    assert json.loads(run(https_server, MODELS))["data"][0]["id"] == "llama"


def test_chat(https_server: Daemon) -> None:
    *frames, done, end = run(https_server, CHAT).split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    head = (
        r'data: \{"id":"endpoint_common_\d+","object":"chat\.completion\.chunk",'
        r'"created":\d+,"model":"llama",'
    )
    choice = (
        r'"choices":\[\{"index":%s,"delta":\{"role":"assistant","content":".*"\},'
        r'"logprobs":null,"finish_reason":%s\}\]\}'
    )
    usage = (
        r'"usage":\{"prompt_tokens":\d+,"prompt_tokens_details": ?\{"cached_tokens": ?0\},'
        r'"completion_tokens":(\d),"total_tokens":\d+,'
        r'"batch_size":\[[\d,]+\],"queue_wait_time":\[[\d,]+\]\},'
    )
    for index in ("0", "1"):
        mine = [frame for frame in frames if f'"choices":[{{"index":{index},' in frame]
        assert 1 <= len(mine) <= 5
        assert all(re.fullmatch(head + choice % (index, "null"), frame) for frame in mine[:-1]), mine
        last = re.fullmatch(head + usage + choice % (index, '"(?:length|stop)"'), mine[-1])
        assert last and int(last[1]) == len(mine), mine[-1]


def test_completions_with_beams(https_server: Daemon) -> None:
    frame, done, end = run(https_server, COMPLETIONS).split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    body = json.loads(frame.removeprefix("data: "))
    assert list(body) == ["id", "object", "created", "model", "choices", "usage"]
    assert body["object"] == "text_completion" and body["usage"]["completion_tokens"] == 10
    assert len(body["usage"]["batch_size"]) == len(body["usage"]["queue_wait_time"]) == 10
    first, second = body["choices"]
    for index, choice in enumerate((first, second)):
        assert list(choice) == ["index", "text", "logprobs", "stop_reason", "finish_reason"]
        assert (choice["index"], choice["stop_reason"], choice["finish_reason"]) == (index, None, "length")
        logprobs = choice["logprobs"]
        assert list(logprobs) == ["text_offset", "token_logprobs", "tokens", "top_logprobs"]
        assert "".join(logprobs["tokens"]) == choice["text"]
        assert [len(values) for values in logprobs.values()] == [5] * 4
        assert all(2 <= len(top) <= 3 for top in logprobs["top_logprobs"])
    assert second["logprobs"]["text_offset"][0] == len(first["text"])  # as the page prints it
    assert sum(first["logprobs"]["token_logprobs"]) >= sum(second["logprobs"]["token_logprobs"])


def test_infer(https_server: Daemon) -> None:
    answer = json.loads(run(https_server, INFER))
    assert list(answer) == ["generated_text", "details"] and answer["generated_text"]
    assert list(answer["details"]) == ["finish_reason", "generated_tokens", "seed"]
    assert answer["details"]["generated_tokens"] <= 20 and answer["details"]["seed"] >= 0
    assert answer["details"]["finish_reason"] in ("length", "eos_token")


def test_infer_stream(https_server: Daemon) -> None:
    *events, end = run(https_server, INFER_STREAM).split("\n\n")
    assert end == "" and all(event.startswith("data: {") for event in events)
    frames: list[Json] = [json.loads(event.removeprefix("data: ")) for event in events]
    times, token = ["prefill_time", "decode_time"], ["id", "text"]
    for number, frame in enumerate(frames):
        given = [frame[key] is not None for key in times]
        assert given == [number == 0, number != 0] and list(frame["token"]) == token
    assert all(list(frame) == [*times, "token"] for frame in frames[:-1])
    last = frames[-1]
    assert list(last) == [*times, "generated_text", "details", "token"] and last["token"]["text"] is None
    assert last["details"]["generated_tokens"] == len(frames)
    assert last["generated_text"].startswith("".join(frame["token"]["text"] for frame in frames[:-1]))
