"""P10: no secret, prompt or answer is in anything the service writes. P11: the shipped defaults are safe."""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import json
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from tests.e2e.endpoints import ENDPOINTS, MODEL, NAME, Endpoint
from tests.harness import HOST, Answer, Daemon, Installation, Json, stock_config
from tests.reliability.abused import CHAT, COMPLETIONS

PROMPT = "Xylophon4711"
ANSWER = "Quagga4712"  # by a grammar, so that it is known what the model says
API_KEY = "sk-Ocelot4713"
PASSPHRASE = "Wombat4714"
MARKERS = (PROMPT, ANSWER, API_KEY, PASSPHRASE)
WHERE_OUTPUT_IS_NOT = ("conf", "security", "bin")


@pytest.fixture(scope="module")
def guarded(installation: Installation) -> Iterator[Daemon]:
    """Mutual TLS with an encrypted key, the model itself, and everything logged."""
    passwords = {"tlsPkPwd": "security/pass/key_pwd.txt"}
    daemon = installation.daemon({"ServerConfig": passwords}, https=True)
    key_file = daemon.root / "security" / "keys" / "server.key.pem"
    key = load_pem_private_key(key_file.read_bytes(), None)
    encryption = BestAvailableEncryption(PASSPHRASE.encode())
    key_file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption))
    password_file = daemon.root / "security" / "pass" / "key_pwd.txt"
    password_file.parent.mkdir(mode=0o700, exist_ok=True)
    password_file.touch(mode=0o600)
    password_file.write_text(PASSPHRASE + "\n", encoding="utf-8")
    daemon.environ["MINDIE_LOG_LEVEL"] = "DEBUG"
    daemon.start().wait_ready()
    yield daemon
    if daemon.popen.poll() is None:
        daemon.stop()


# -- the shipped configuration ------------------------------------------------------------------------


def handshake(context: ssl.SSLContext, port: int) -> str | None:
    """The version agreed on. Under TLS 1.3 a client learns that it is refused when it reads."""
    with contextlib.closing(http.client.HTTPSConnection(HOST, port, timeout=30, context=context)) as client:
        client.connect()
        version: str | None = client.sock.version()  # type: ignore[attr-defined]
        client.request("GET", "/")
        client.getresponse().read()
        return version


PORTS: list[Callable[[Daemon], int]] = [
    lambda d: d.port,
    lambda d: d.management_port,
    lambda d: d.metrics_port,
]


@pytest.mark.parametrize("port_of", PORTS, ids=["business", "management", "metrics"])
def test_P11_every_plane_wants_tls_1_3_and_a_certificate(
    guarded: Daemon, port_of: Callable[[Daemon], int]
) -> None:
    port = port_of(guarded)
    assert handshake(guarded.tls(), port) == "TLSv1.3"
    old = guarded.tls()
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    stranger = ssl.create_default_context(cafile=str(guarded.client_dir / "ca.pem"))
    for context in (old, stranger):
        with pytest.raises((ssl.SSLError, ConnectionError)):
            handshake(context, port)


def test_P11_the_shipped_config_binds_loopback_and_keeps_the_planes_apart() -> None:
    server = stock_config()["ServerConfig"]
    business = (server["ipAddress"], server["port"])
    management = (server["managementIpAddress"], server["managementPort"])
    metrics = (server["managementIpAddress"], server["metricsPort"])
    assert len({business, management, metrics}) == 3
    assert all(ipaddress.ip_address(address).is_loopback for address, _ in (business, management))
    assert server["httpsEnabled"] is True and server["allowAllZeroIpListening"] is False
    (model,) = stock_config()["BackendConfig"]["ModelDeployConfig"]["ModelConfig"]
    assert model["trustRemoteCode"] is False


def test_P11_no_page_is_let_in_and_nothing_is_fetched(guarded: Daemon) -> None:
    for method, path in (("OPTIONS", CHAT.path), ("POST", CHAT.path), ("GET", "/v1/models")):
        with contextlib.closing(guarded.connect()) as connection:
            headers = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
            connection.request(method, path, b"{}", headers)
            response = connection.getresponse()
            response.read()
        assert not [name for name in response.headers if name.lower().startswith("access-control")]
    image: list[Json] = [{"type": "image_url", "image_url": {"url": f"https://{HOST}:{guarded.port}/"}}]
    assert CHAT.ask(guarded, image).status == 422
    for path in ("/stopService", "/v1/config", "/metrics", "/v1/load_lora_adapter"):  # of the other planes
        assert guarded.get(path).status == 404


# -- what is written -----------------------------------------------------------------------------------


@dataclass
class Visitor:
    """Sends requests with a key in their headers, and keeps all it is told."""

    daemon: Daemon
    told: list[bytes] = field(default_factory=list)

    def send(self, method: str, path: str, body: Any = None, port: int | None = None) -> Answer:
        raw = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {API_KEY}", "X-Api-Key": API_KEY, "Cookie": f"key={API_KEY}"}
        with contextlib.closing(self.daemon.connect(port)) as connection:
            connection.request(method, path, raw, headers)
            response = connection.getresponse()
            answer = Answer(response.status, dict(response.getheaders()), response.read())
        self.told.append(json.dumps(answer.headers).encode())
        return answer

    def post(self, path: str, body: Any) -> Answer:
        return self.send("POST", path, body)

    def ask(self, endpoint: Endpoint, **options: Any) -> Answer:
        return self.post(endpoint.path, endpoint.body(PROMPT, **options))


def good(visitor: Visitor) -> None:
    for endpoint in ENDPOINTS.values():
        prompt = [300, 301] if endpoint.family == "tensors" else PROMPT
        assert visitor.post(endpoint.path, endpoint.body(prompt, max_tokens=2)).status == 200
    for endpoint in (CHAT, COMPLETIONS):
        for stream in (False, True):
            answer = visitor.ask(endpoint, stream=stream, max_tokens=40, guided_choice=[ANSWER])
            assert answer.status == 200 and (stream or ANSWER.encode() in answer.body)
    tool = {"type": "function", "function": {"name": PROMPT, "description": PROMPT}}
    assert visitor.ask(CHAT, tools=[tool], tool_choice="required").status == 200
    assert visitor.ask(CHAT, chat_template="{{ messages[0].content }}" + PROMPT).status == 200
    assert visitor.ask(CHAT, user=PROMPT, stop=[PROMPT], metadata={PROMPT: PROMPT}).status == 200
    assert visitor.post("/v1/tokenizer", {"inputs": PROMPT}).status == 200


def bad(visitor: Visitor) -> None:
    """Everything that makes the server complain, with the marker where it complains about."""
    for endpoint in ENDPOINTS.values():
        prompt: Any = [300, 301] if endpoint.family == "tensors" else PROMPT
        raw = json.dumps({**endpoint.body(prompt), "user": PROMPT}).encode()
        for body in (
            raw[:-1],
            raw + PROMPT.encode(),
            raw.replace(PROMPT.encode(), PROMPT.encode() + b"\xff"),
            raw.replace(b"{", b'{"%s": 1, "%s": 2, ' % (PROMPT.encode(), PROMPT.encode()), 1),
            json.dumps({**endpoint.body(prompt, seed=PROMPT), "id": f"{PROMPT} "}).encode(),
        ):
            assert visitor.post(endpoint.path, body).status in (404, 422)
    for form in (
        {"guided_regex": f"({PROMPT}"},
        {"guided_grammar": f"root ::= {PROMPT}"},
        {"guided_json": {"type": "object", "properties": {PROMPT: {"$ref": f"#/{PROMPT}"}}}},
        {"guided_regex": f"({PROMPT}{{1,90}}){{1,9000}}"},
        {"chat_template": f"{{{{ raise_exception('{PROMPT}') }}}}"},
        {"chat_template_kwargs": {"messages": PROMPT}},
        {"tools": [{"type": "function", "function": {"name": f"{PROMPT}/"}}]},
    ):
        assert visitor.ask(CHAT, **form).status == 422, form
    assert visitor.ask(COMPLETIONS, logit_bias={PROMPT: 1}).status == 422
    assert visitor.post(f"{MODEL}/stopInfer", {"id": PROMPT}).status == 404
    for path in ("/nowhere", f"/v1/models/nobody?key={API_KEY}&q={PROMPT}", "/v2/models/nobody/config"):
        assert visitor.send("GET", path).status == 404
    port = visitor.daemon.management_port
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", f"/health/timed-x?q={PROMPT}"):
        assert visitor.send("POST", path, {"lora_name": f"{PROMPT} ", "lora_path": "/"}, port).status >= 400


def malformed(visitor: Visitor) -> None:
    headers = (
        f"Authorization: Bearer {API_KEY}\x01",
        f"{PROMPT} {PROMPT}: x",
        f"X: {PROMPT}{'x' * 9000}",
        f"Transfer-Encoding: chunked\r\n\r\n{PROMPT}",
    )
    for header in headers:
        with contextlib.closing(visitor.daemon.connect()) as connection:
            connection.connect()
            connection.sock.sendall(
                f"POST /v1/completions?q={PROMPT} HTTP/1.1\r\nHost: x\r\n{header}\r\n\r\n".encode()
            )
            with contextlib.suppress(ConnectionError, http.client.BadStatusLine):
                response = http.client.HTTPResponse(connection.sock)
                response.begin()
                visitor.told.append(response.read())


def hangs_up(visitor: Visitor) -> None:
    with visitor.daemon.streaming(
        COMPLETIONS.path, COMPLETIONS.body(PROMPT, stream=True, max_tokens=400)
    ) as r:
        assert r.read(1)


def written(daemon: Daemon) -> Iterator[tuple[str, bytes]]:
    """Every file of the installation that the service may have written, and what it wrote on its streams."""
    for path in daemon.root.rglob("*"):
        if path.is_file() and path.relative_to(daemon.root).parts[0] not in WHERE_OUTPUT_IS_NOT:
            yield str(path), path.read_bytes()


@pytest.mark.slow
def test_P10_no_secret_prompt_or_answer_is_written_at_any_level(guarded: Daemon) -> None:
    visitor = Visitor(guarded)
    for conduct in (good, bad, malformed, hangs_up):
        conduct(visitor)
    for port, path in (
        (guarded.metrics_port, "/metrics"),
        (guarded.management_port, "/metrics-json"),
        (guarded.management_port, "/v1/status"),
        (guarded.management_port, "/info"),
        (guarded.management_port, "/v1/config"),
        (guarded.management_port, "/openapi.json"),
        (guarded.port, "/v1/models"),
        (guarded.port, f"{MODEL}/config"),
    ):
        visitor.told.append(visitor.send("GET", path, port=port).body)
    visitor.told.append(visitor.post(COMPLETIONS.path, {"model": NAME}).body)  # another one's error
    assert guarded.stop() == 0
    outputs = dict(written(guarded))
    assert any(b"[DEBUG]" in output for output in outputs.values())
    for name, output in [*outputs.items(), *(("an answer", told) for told in visitor.told)]:
        for marker in MARKERS:
            assert marker.encode() not in output, (
                name,
                output[max(0, output.find(marker.encode()) - 200) :][:400],
            )
