"""The manual's commands as written, under mutual TLS, and the clients that must be refused."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import ssl
import subprocess
import sys

import pytest

from tests.harness import HOST, REPO, Daemon

# mindie_quickstart_zh.md, with only the port replaced
CURL = (
    'curl -sS -H "Accept: application/json" -H "Content-type: application/json" '
    "--cacert ca.pem --cert client.pem  --key client.key.pem "
)
INFER = """{
    "inputs": "My name is Olivier and I",
    "stream": %s,
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
}"""
CHAT = """{
    "model": "mindie-tiny",
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
    "n": 1,
    "best_of": 1
}"""
COMPLETION = """{
    "model": "mindie-tiny",
    "prompt": "who are you",
    "temperature": 1,
    "max_tokens": 5,
    "ignore_eos":true,
    "stream": true
}"""


def curl(server: Daemon, arguments: str, path: str) -> str:
    command = f"{CURL} {arguments} https://{HOST}:{server.port}{path}"
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
    assert json.loads(curl(https_server, "-X GET", "/v1/models"))["data"][0]["id"] == "mindie-tiny"


def test_infer_as_written(https_server: Daemon) -> None:
    answer = json.loads(curl(https_server, f"-X POST -d '{INFER % 'false'}'", "/infer"))
    assert answer["generated_text"] and answer["details"]["generated_tokens"] <= 20
    assert answer["details"]["finish_reason"] in ("length", "eos_token") and answer["details"]["seed"] >= 0


def test_infer_stream_as_written(https_server: Daemon) -> None:
    frames = curl(https_server, f"-X POST -d '{INFER % 'true'}'", "/infer").strip().split("\n\n")
    shape = re.compile(
        r'data: \{"prefill_time":(null|[\d.]+),"decode_time":(null|[\d.]+),("generated_text":.*)?"token":'
    )
    assert all(shape.match(frame) for frame in frames), frames
    assert json.loads(frames[-1].removeprefix("data: "))["details"]["generated_tokens"] == len(frames)


def test_chat_as_far_as_one_choice_goes(https_server: Daemon) -> None:
    *frames, done = curl(https_server, f"-X POST -d '{CHAT}'", "/v1/chat/completions").strip().split("\n\n")
    assert done == "data: [DONE]" and 1 <= len(frames) <= 5
    shape = re.compile(
        r'data: \{"id":"endpoint_common_\d+","object":"chat\.completion\.chunk","created":\d+,'
        r'"model":"mindie-tiny",'
        r'("usage":\{.*\},)?"choices":\[\{"index":0,"delta":\{"role":"assistant","content":".*"\},"logprobs":null,'
        r'"finish_reason":(null|"length"|"stop")\}\]\}$'
    )
    assert all(shape.match(frame) for frame in frames), frames


def test_completions_as_far_as_plain_sampling_goes(https_server: Daemon) -> None:
    *frames, done = curl(https_server, f"-X POST -d '{COMPLETION}'", "/v1/completions").strip().split("\n\n")
    assert done == "data: [DONE]" and len(frames) == 5
    assert json.loads(frames[-1].removeprefix("data: "))["usage"]["completion_tokens"] == 5


def handshake(server: Daemon, context: ssl.SSLContext, port: int | None = None) -> None:
    """Connect and wait for the server's verdict: under TLS 1.3 it comes after the client is done."""
    connection = http.client.HTTPSConnection(HOST, port or server.port, timeout=30, context=context)
    with contextlib.closing(connection):
        connection.request("GET", "/v1/models")
        connection.getresponse().read()


@pytest.mark.parametrize("plane", ["port", "management_port", "metrics_port"])
def test_every_plane_takes_the_demo_client_and_nobody_else(https_server: Daemon, plane: str) -> None:
    port = getattr(https_server, plane)
    handshake(https_server, https_server.tls(), port)
    stranger = ssl.create_default_context(cafile=str(https_server.client_dir / "ca.pem"))
    with pytest.raises((ssl.SSLError, ConnectionError)):
        handshake(https_server, stranger, port)


def test_tls_1_2_is_refused(https_server: Daemon) -> None:
    context = https_server.tls()
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises((ssl.SSLError, ConnectionError)):
        handshake(https_server, context)


def test_a_client_of_another_authority_is_refused(
    https_server: Daemon, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = tmp_path_factory.mktemp("other") / "security"
    script = REPO / "scripts" / "make_certs.py"
    subprocess.run([sys.executable, script, "--dir", other], check=True, capture_output=True)
    context = ssl.create_default_context(cafile=str(https_server.client_dir / "ca.pem"))
    context.load_cert_chain(other / "client" / "client.pem", other / "client" / "client.key.pem")
    with pytest.raises((ssl.SSLError, ConnectionError)):
        handshake(https_server, context)


def test_plain_http_to_the_tls_port_harms_nobody(https_server: Daemon) -> None:
    plain = Daemon(https_server.root, False, https_server.port, 0, 0)
    with pytest.raises((ConnectionError, http.client.BadStatusLine)):
        plain.get("/v1/models")
    assert https_server.get("/v1/models").status == 200
