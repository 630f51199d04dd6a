"""/openapi.json and /docs: complete, well formed, and true of what the server routes and answers."""

from __future__ import annotations

import asyncio
import copy
import json
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer
from jsonschema import Draft202012Validator

from endpoint import metadata, models_api
from endpoint.answer_schemas import OF_ADAPTER, SCHEMAS
from endpoint.api_keys import ApiKeys
from endpoint.app import BusinessPlane, make_app
from endpoint.docs_page import curl, render
from endpoint.http_errors import STATUS, error_body
from endpoint.management import ManagementPlane
from endpoint.metrics import Metrics
from endpoint.openapi import ERROR_MEANINGS, openapi_document
from endpoint.operations import operations, template
from endpoint.protocols.base import (
    ChatFormat,
    FinishReason,
    PromptToken,
    ProtocolAdapter,
    ReplyContext,
    TokenLogprob,
    TokenStep,
)
from endpoint.protocols.registry import load_adapters
from endpoint.reasoning import Opening
from engine.errors import InvalidRequest
from engine.settings import EndpointSettings, Listener, ModelSettings, Plane, ScheduleSettings, TlsFiles
from tests.endpoint.samples import completion, context, model_info, steps

Json = dict[str, Any]

ADAPTERS = load_adapters()
DOCUMENT = openapi_document(ADAPTERS, "llama")
PAGE = render(DOCUMENT, "llama")
PLANES: tuple[Plane, ...] = ("business", "management", "metrics")

SETTINGS = EndpointSettings(
    listeners=(Listener(PLANES, "0.0.0.0", 4000, None),),
    max_link_num=10,
    max_request_bytes=1 << 20,
    max_json_depth=64,
    full_text=False,
    openai_flavour="vllm",
    token_timeout_s=60,
    e2e_timeout_s=60,
    tokenizer_threads=1,
    metrics_enabled=True,
)
SCHEDULE = ScheduleSettings(
    block_size=128,
    max_prefill_batch_size=5,
    max_prefill_tokens=512,
    max_batch_size=20,
    max_iter_times=512,
    max_queue_delay_us=0,
    max_first_token_wait_ms=0,
    max_n=5,
    max_seq_len=2560,
    max_input_len=2048,
    truncation="off",
)
MODEL = ModelSettings(
    name="llama",
    weight_path=Path("/nowhere"),
    instance_type="Standard",
    device_type="cpu",
    dtype="float32",
    kv_cache_gib=-1,
    kv_cache_mib=0,
    kv_block_num=0,
    memory_fraction=0.8,
    cpu_threads=1,
    trust_remote_code=False,
    ignore_eos=False,
    world_size=1,
    cpu_mem_gib=5,
)


def planes(adapters: list[ProtocolAdapter]) -> tuple[BusinessPlane, ManagementPlane, Metrics]:
    metrics = Metrics("llama", 10, lambda: ())
    business = BusinessPlane(adapters, SETTINGS, SCHEDULE, MODEL, metrics)
    return business, ManagementPlane(SETTINGS, SCHEDULE, MODEL, metrics), metrics


def described() -> Iterator[tuple[str, str, Json]]:
    """method, path, operation"""
    for path, item in DOCUMENT["paths"].items():
        for method in ("get", "post"):
            if method in item:
                yield method, path, item[method]


# -- routes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plane", PLANES)
def test_what_is_described_is_what_is_routed(plane: Plane) -> None:
    business, management, metrics = planes(ADAPTERS)
    app = make_app([plane], business, management, metrics, SETTINGS, ApiKeys(()))
    routed = {
        (route.method.lower(), template(route.resource.canonical))
        for route in app.router.routes()
        if route.resource is not None and route.method != "HEAD"
    }
    assert {(method, path) for method, path, found in described() if found["tags"] == [plane]} == routed


def test_no_route_is_listed_twice() -> None:
    listed = [(operation.method, operation.path) for operation in operations(ADAPTERS)]
    assert len(listed) == len(set(listed))


@pytest.mark.filterwarnings("ignore:It is recommended to use web.RequestKey")  # which aiohttp 3.9 has not
def test_both_documents_are_there_while_the_model_loads() -> None:
    async def ask() -> tuple[Json, str, str]:
        business, management, metrics = planes(ADAPTERS)
        app = make_app(["management"], business, management, metrics, SETTINGS, ApiKeys(()))
        async with TestClient(TestServer(app)) as client:
            document = await client.get("/openapi.json")
            page = await client.get("/docs")
            ready = await client.get("/v2/health/ready")
            assert (document.status, page.status, ready.status) == (200, 200, 503)
            return await document.json(), page.headers["Content-Type"], await page.text()

    document, content_type, page = asyncio.run(ask())
    addresses = {item["servers"][0]["url"] for item in document["paths"].values()}
    assert addresses == {"http://127.0.0.1:4000"}, "of the listener that has all planes"
    assert document["paths"].keys() == DOCUMENT["paths"].keys()
    assert content_type == "text/html; charset=utf-8"
    assert page.startswith("<!DOCTYPE html>") and "http://127.0.0.1:4000/v1/chat/completions" in page


# -- the document ------------------------------------------------------------------------------------


def nodes(value: Any) -> Iterator[Json]:
    """Every object of a JSON value."""
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from nodes(item)


def resolved(reference: str) -> Any:
    found: Any = DOCUMENT
    for step in reference.removeprefix("#/").split("/"):
        found = found[step]
    return found


def test_the_document_is_json_whose_references_lead_somewhere() -> None:
    assert DOCUMENT["openapi"].startswith("3.1.")
    assert json.loads(json.dumps(DOCUMENT)) == DOCUMENT
    references = [node["$ref"] for node in nodes(DOCUMENT) if "$ref" in node]
    assert references
    for reference in references:
        assert isinstance(resolved(reference), dict)


def test_addresses_are_those_of_the_listeners() -> None:
    tls = TlsFiles((), Path("cert"), Path("key"), None, ())
    listeners = [
        Listener(("business",), "::", 1, tls),
        Listener(("management",), "0.0.0.0", 2, None),
        Listener(("metrics",), "10.0.0.1", 3, None),
    ]
    document = openapi_document(ADAPTERS, "llama", listeners)
    urls = {item["servers"][0]["url"] for item in document["paths"].values()}
    assert urls == {"https://[::1]:1", "http://127.0.0.1:2", "http://10.0.0.1:3"}


def test_every_schema_is_a_schema() -> None:
    schemas = dict(DOCUMENT["components"]["schemas"])
    for method, path, operation in described():
        for parameter in operation.get("parameters", []):
            schemas[f"{method} {path} {parameter['name']}"] = parameter["schema"]
    for schema in schemas.values():
        Draft202012Validator.check_schema(schema)


def test_operations_have_what_the_specification_asks_for() -> None:
    ids = [operation["operationId"] for _, _, operation in described()]
    assert len(ids) == len(set(ids)) and all(re.fullmatch(r"\w+", name) for name in ids)
    tags = {tag["name"] for tag in DOCUMENT["tags"]}
    for method, path, operation in described():
        in_path = {p["name"] for p in operation.get("parameters", []) if p["in"] == "path"}
        assert in_path == set(re.findall(r"\{(\w+)\}", path)), path
        assert all(p["required"] for p in operation.get("parameters", []) if p["in"] == "path")
        assert operation["summary"] and set(operation["tags"]) <= tags
        assert ("requestBody" in operation) is (method == "post")
        assert operation["responses"]
        for status, response in operation["responses"].items():
            assert re.fullmatch(r"[1-5]\d\d", status)
            found = resolved(response["$ref"]) if "$ref" in response else response
            assert found["description"]


def test_every_example_fits_its_schema() -> None:
    count = 0
    for _, path, operation in described():
        content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
        schema = {**content.get("schema", {}), "components": DOCUMENT["components"]}
        for title, example in content.get("examples", {}).items():
            errors = [error.message for error in Draft202012Validator(schema).iter_errors(example["value"])]
            assert errors == [], (path, title)
            assert example["value"].get("model", "llama") == "llama"
            count += 1
    assert count > 20


def test_every_error_status_has_its_meaning() -> None:
    assert {status for status, _ in STATUS.values()} == ERROR_MEANINGS.keys()


# -- answers -----------------------------------------------------------------------------------------


def closed(value: Any) -> Any:
    """The schema without room for members it does not name."""
    if isinstance(value, dict):
        value = {key: closed(item) for key, item in value.items()}
        if "properties" in value:
            value.setdefault("additionalProperties", False)
        return value
    return [closed(item) for item in value] if isinstance(value, list) else value


CLOSED = closed(copy.deepcopy(DOCUMENT["components"]["schemas"]))


def check(name: str, answer: bytes | str | Json) -> None:
    """An answer fits the schema and has no member that the schema does not tell of."""
    value = json.loads(answer) if isinstance(answer, bytes | str) else answer
    schema = {"$ref": f"#/components/schemas/{name}", "components": {"schemas": CLOSED}}
    assert [error.message for error in Draft202012Validator(schema).iter_errors(value)] == [], value


def payloads(frame: bytes) -> list[str]:
    texts = [text.removeprefix("data:").strip() for text in re.split("\n\n|\0", frame.decode())]
    return [text for text in texts if text and text != "[DONE]"]


LOGPROBS = [("a", -0.5, [("a", -0.5), ("b", -1.5)]), ("b", -0.25, [("b", -0.25), ("c", -3.0)])]
PROMPT = (
    PromptToken(TokenLogprob(5, "x", 0.0), 0, ()),
    PromptToken(TokenLogprob(6, "y", -0.5), 2, (TokenLogprob(7, "z", -0.1),)),
)
USAGE = {"stream_options": {"include_usage": True}}
ASKED: dict[str, list[Json]] = {
    "openai_chat": [{}, {"logprobs": True, "top_logprobs": 2, "prompt_logprobs": 1}, USAGE],
    "openai_completions": [{}, {"logprobs": 2, "echo": True}, {"prompt_logprobs": 1}, USAGE],
    "tgi_generate": [{}, {"parameters": {"decoder_input_details": True}}],
    "tgi_generate_stream": [{}, {"parameters": {"details": True, "return_full_text": True}}],
    "tgi_root": [{}, {"parameters": {"details": True}}],
    "triton_generate": [{}, {"parameters": {"details": True, "perf_stat": True}}],
    "triton_generate_stream": [{}, {"details": True, "parameters": {"perf_stat": True}}],
    "mindie_native": [{}, {"parameters": {"details": True}}],
}


def answered(
    adapter: Any, body: Json, of: Sequence[TokenStep], about: ReplyContext
) -> Iterator[tuple[str, str]]:
    """What a dialect answers, whole and in frames: the schema's name and the JSON."""
    whole, frame = OF_ADAPTER[adapter.name]
    request = adapter.parse(body, about.model, {"model": "llama"})
    if whole is not None:
        yield whole, adapter.reply(request, body, about).result([completion(of)]).decode()
    if frame is not None:
        reply = adapter.reply(request, body, about)
        for sent in [*(reply.frame(step) for step in of), *reply.tail()]:
            yield from ((frame, text) for text in payloads(sent))
        for sent in adapter.reply(request, body, about).error_frames(InvalidRequest("no")):
            yield from (("Error", text) for text in payloads(sent))


@pytest.mark.parametrize("adapter", ADAPTERS, ids=[adapter.name for adapter in ADAPTERS])
def test_what_a_dialect_answers_is_described(adapter: Any) -> None:
    example = {**next(iter(adapter.body.examples.values())), "model": "llama"}
    for members in ASKED.get(adapter.name, [{}]):
        logprobs = LOGPROBS if members.keys() & {"logprobs", "prompt_logprobs"} else ()
        for full_text in (False, True):
            for finish in FinishReason:
                of = steps(["a", "b"], finish=finish, logprobs=logprobs)
                of[0] = replace(of[0], prompt=PROMPT if logprobs else ())
                about = context(full_text=full_text, prompt_ids=[5, 6], echoes=["hi"])
                found = list(answered(adapter, {**example, **members}, of, about))
                assert found
                for name, text in found:
                    check(name, text)


def test_calls_and_reasoning_are_described() -> None:
    (adapter,) = [adapter for adapter in ADAPTERS if adapter.name == "openai_chat"]
    model = replace(model_info(), chat=ChatFormat(tools="hermes", reasoning=True))
    about = replace(context(), model=model, opening=Opening.MODEL)
    texts = [
        "<think>",
        "why",
        "</think>",
        "so",
        '<tool_call>\n{"name": "get_weather", ',
        '"arguments": {}}\n</tool_call>',
    ]
    of = steps(texts, finish=FinishReason.EOS)
    body = {**adapter.body.examples["tools"], "model": "llama"}
    found = [(name, json.loads(text)) for name, text in answered(adapter, body, of, about)]
    for name, answer in found:
        check(name, answer)
    message = found[0][1]["choices"][0]["message"]
    assert message["tool_calls"] and message["reasoning_content"] == "why"
    assert found[0][1]["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0


def test_what_describes_the_server_is_described() -> None:
    info = model_info()
    instances = [metadata.Occupancy(1, 2, 3, 4, 5)]
    check("ModelList", models_api.model_list(info))
    check("Model", models_api.model_card(info, "llama"))
    check("ServerMetadata", metadata.server_metadata(SCHEDULE))
    check("ModelMetadata", metadata.model_metadata(info, "llama"))
    check("ModelConfig", metadata.model_config(info, MODEL, "llama"))
    check("ServerConfig", metadata.server_config(info, MODEL, 128))
    check("Info", metadata.tgi_info(info, "cpu", "float32", 10, 128, 5))
    check("SlotCount", metadata.slot_count(info, "llama", instances, 20, 128))
    check("Status", metadata.status(instances, 20))
    check("StatusV2", metadata.status_v2(instances, 20))
    check("MetricsVector", planes([])[2].vector("127.0.0.1:1"))
    for kind in STATUS:
        error = kind("text", ()) if kind.__name__ == "MethodNotAllowed" else kind("text")
        check("Error", error_body(error))


def test_every_answer_schema_is_used() -> None:
    used = {node["$ref"].rpartition("/")[2] for node in nodes(DOCUMENT) if "$ref" in node}
    used |= {name for node in nodes(DOCUMENT) for name in node.get("x-frames", [])}
    assert SCHEMAS.keys() <= used


# -- the page ----------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Notes what a browser would fetch or run, and whether every element is closed."""

    VOID = ("meta", "br", "hr", "img", "link", "input")

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for name, value in attrs if name in ("href", "src", "action")]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag


def test_the_page_stands_alone() -> None:
    page = Page()
    page.feed(PAGE)
    assert page.open == [] and not page.tags & {"script", "link", "img", "iframe", "object"}
    assert "url(" not in PAGE and "@import" not in PAGE
    assert len(page.ids) == len(set(page.ids))
    assert {link for link in page.links if not link.startswith("#")} == {"openapi.json"}
    assert {link[1:] for link in page.links if link.startswith("#")} == set(page.ids)


def test_the_page_tells_of_every_route_field_and_error() -> None:
    text = re.sub(r"<[^>]*>", "", PAGE)
    for _, path, operation in described():
        assert path in text and operation["operationId"] in PAGE
    for adapter in ADAPTERS:
        for path, _ in adapter.body.walk():
            assert path[-1] in text, path
    for status in ERROR_MEANINGS:
        assert f"<code>{status}</code>" in PAGE


def test_text_from_the_configuration_cannot_become_markup() -> None:
    page = render(openapi_document(ADAPTERS, "<script>'\""), "<script>'\"")
    assert "<script>" not in page and "&lt;script&gt;" in page


def test_commands_survive_the_shell() -> None:
    command = curl("http://h/generate_stream", {"inputs": "it's $HOME"})
    assert command == """curl -N http://h/generate_stream \\\n  -d '{"inputs": "it'"'"'s $HOME"}'"""
    assert curl("http://h/v2") == "curl http://h/v2"
    assert "--cert" in curl("https://h/v2") and "--cert" in curl("https://h/infer", {})
    body = {"prompt": "it's long", "more": "x" * 100}
    _, url, option, sent = shlex.split(curl("http://h/generate", body).replace("\\\n", ""))
    assert (url, option, json.loads(sent)) == ("http://h/generate", "-d", body)
