"""A01, A03, A04, A06, A16, A17: bodies that mean harm cost one refusal, and the next request is served."""

from __future__ import annotations

import json
import pickle
import re
import sys
import zlib
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import numpy as np
import psutil
import pytest

from endpoint.declarations import Boolean, Declaration, Flag, Integer, Number, RequestBody, Single
from endpoint.protocols.base import ProtocolAdapter
from endpoint.protocols.registry import load_adapters
from endpoint.token_count import COUNT_BODY
from tests.e2e.endpoints import ENDPOINTS, NAME, Endpoint
from tests.harness import Daemon, Installation, Json
from tests.reliability.abused import MARK, abused, assert_served, exchange, post, refusal

Path = tuple[str, ...]
Member = tuple[Path, Declaration]

HUGE = b"1" + b"0" * 30
DIGITS = 4300  # the interpreter reads no longer integer
HOSTILE_NUMBERS = [
    HUGE, b"-" + HUGE, b"9" * (DIGITS - 1), b"9" * 5000, b"-1", b"0", b"1.5", b"1e308", b"1e400", b"-1e400",
    b"NaN", b"Infinity", b"-Infinity", b"9223372036854775808", b"true", b"false", b'"1"', b"[1]", b"{}",
]  # fmt: skip
NO_JSON = {b"NaN", b"Infinity", b"-Infinity", b"9" * 5000}  # refused before anybody knows whose value it is
ADAPTERS = [pytest.param(adapter, id=adapter.name) for adapter in load_adapters()]


@pytest.fixture(scope="module")
def daemon(installation: Installation) -> Iterator[Daemon]:
    with abused(installation) as daemon:
        yield daemon


# -- a body with one member spoilt --------------------------------------------------------------------


def example(body: RequestBody) -> Json:
    found: Json = json.loads(json.dumps(next(iter(body.examples.values()))))
    return {**found, "model": NAME, "max_tokens": 2} if "model" in found else found


def spoilt(good: Json, path: Path, raw: bytes) -> bytes:
    """`good` as JSON, with `raw` where `path` leads; what is missing on the way is made."""
    body = json.loads(json.dumps(good))
    place = body
    for name in path[:-1]:
        place = place.setdefault(name, {})
        place = place[0] if isinstance(place, list) else place
    place[path[-1]] = MARK
    return json.dumps(body).encode().replace(f'"{MARK}"'.encode(), raw)


def route(adapter: ProtocolAdapter) -> str:
    return re.sub(r"\{[^}]*\}", NAME, adapter.routes[0])


def is_legal(member: Declaration, raw: bytes) -> bool:
    """Whether a declared member may have this value, by its declaration."""
    if raw in NO_JSON:
        return False
    value = json.loads(raw)
    if isinstance(member, Boolean | Flag):
        return isinstance(value, bool)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if isinstance(member, Integer):
        return isinstance(value, int) and value in member.legal
    assert isinstance(member, Number)
    return value in member.legal and abs(value) <= sys.float_info.max


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_A01_every_number_of_every_dialect(daemon: Daemon, adapter: ProtocolAdapter) -> None:
    """Whatever its declaration does not allow is refused by its name; after each member a good request."""
    path, good = route(adapter), example(adapter.body)
    numbers = [m for m in adapter.body.walk() if isinstance(m[1], Integer | Number | Boolean | Flag)]
    assert len(numbers) > 5
    for place, member in numbers:
        for raw in HOSTILE_NUMBERS:
            answer = daemon.post(path, spoilt(good, place, raw))
            case = (place, raw[:40])
            if is_legal(member, raw):
                # another rule may still refuse it: a limit of the server, or another member
                assert answer.status in (200, 422, 424), (case, answer.body)
            elif raw in NO_JSON:
                assert refusal(answer, 422).startswith("the request body"), case
            else:
                text = refusal(answer, 422)
                assert f"{place[-1]}`" in text and "must be" in text, (case, text)
        assert_served(daemon)


# -- token ids ----------------------------------------------------------------------------------------

BAD_IDS = [
    b"-1", b"2048", b"2147483648", b"9223372036854775808", b"18446744073709551616", b"-9223372036854775809",
    b"9" * (DIGITS - 1), b"true", b"1.0", b'"5"', b"null", b"[5]", b"{}",
]  # fmt: skip


@pytest.mark.parametrize("raw", BAD_IDS, ids=lambda raw: raw[:20].decode())
@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/v1/completions", b'{"model": "mindie-tiny", "prompt": [300, ID]}', "prompt"),
        ("/v1/completions", b'{"model": "mindie-tiny", "prompt": [[300], [301, ID]]}', "prompt[1]"),
        ("/infer_token", b'{"input_id": [300, ID]}', "input_id"),
        (
            f"/v2/models/{NAME}/infer",
            b'{"inputs": [{"name": "a", "shape": [2], "datatype": "UINT32", "data": [300, ID]}], '
            b'"outputs": [{"name": "b"}]}',
            "inputs[0].data",
        ),
    ],
    ids=["prompt", "prompts", "input_id", "data"],
)
def test_A16_token_ids_outside_the_vocabulary(
    daemon: Daemon, path: str, body: bytes, field: str, raw: bytes
) -> None:
    text = refusal(daemon.post(path, body.replace(b"ID", raw)), 422, 424)
    assert f"`{field}`" in text, text
    assert_served(daemon)


@pytest.mark.parametrize("raw", BAD_IDS, ids=lambda raw: raw[:20].decode())
def test_A16_token_ids_in_stops_and_biases(daemon: Daemon, raw: bytes) -> None:
    """Ids that no token has are dropped from the stops, as they can never come; a bias names its token."""
    body = b'{"model": "mindie-tiny", "prompt": "a", "max_tokens": 2, "stop_token_ids": [ID]}'
    answer = daemon.post("/v1/completions", body.replace(b"ID", raw))
    if isinstance(json.loads(raw), int) and raw != b"true":
        assert answer.status == 200, answer.body
    else:
        assert "`stop_token_ids`" in refusal(answer, 422)
    name = json.dumps(raw.decode()).encode()
    body = b'{"model": "mindie-tiny", "prompt": "a", "max_tokens": 2, "logit_bias": {NAME: 1}}'
    assert "`logit_bias`" in refusal(daemon.post("/v1/completions", body.replace(b"NAME", name)), 422)
    assert_served(daemon)


# -- JSON that is none, or not for us -----------------------------------------------------------------

NO_BODIES = {
    "100k levels of arrays": b"[" * 100_000,
    "100k levels of objects": b'{"a":' * 100_000,
    "100k levels in a good member": b'{"stop": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "as many [ as a body may have bytes": b"[" * (39 << 20),
    "a million values": b'{"model": "mindie-tiny", "stop": [' + b"0," * 1_000_000 + b"0]}",
    "the same name twice": b'{"model": "mindie-tiny", "prompt": "a", "prompt": "b"}',
    "the same name twice inside": b'{"model": "mindie-tiny", "prompt": "a", "logit_bias": {"1": 1, "1": 2}}',
    "NaN": b'{"model": "mindie-tiny", "prompt": "a", "user": NaN}',
    "an integer of 5000 digits": b'{"model": "mindie-tiny", "prompt": "a", "user": ' + b"9" * 5000 + b"}",
    "two byte order marks": b"\xef\xbb\xbf\xef\xbb\xbf{}",
    "UTF-16": '{"model": "mindie-tiny", "prompt": "a"}'.encode("utf-16"),
    "NUL before": b'\x00{"model": "mindie-tiny", "prompt": "a"}',
    "NUL inside of a string": b'{"model": "mindie-tiny", "prompt": "a\x00"}',
}  # fmt: skip


@pytest.mark.parametrize("attack", NO_BODIES)
def test_A03_json_that_means_harm(daemon: Daemon, attack: str) -> None:
    assert refusal(daemon.post("/v1/completions", NO_BODIES[attack]), 422).startswith("the request body")
    assert_served(daemon)


BODIES = {
    **{adapter.name: (route(adapter), adapter.body) for adapter in load_adapters()},
    "tokenizer": ("/v1/tokenizer", COUNT_BODY),
}


@pytest.mark.parametrize("name", BODIES)
def test_A03_half_a_surrogate_pair_in_every_member(daemon: Daemon, name: str) -> None:
    """As a value and as a name: it can never reach an encoder."""
    path, body = BODIES[name]
    good = example(body)
    for place, _ in body.walk():
        for half in (b'"\\ud800"', b'["a\\udfff"]', b'{"\\uD800x": 1}', b'"\\udc00\\ud800"'):
            assert "surrogate" in refusal(daemon.post(path, spoilt(good, place, half)), 422), place
    for whole in (b'"\\ud83d\\ude00"', b'"\\\\ud800"'):
        answer = daemon.post(path, spoilt(good, ("user",), whole))
        assert answer.status == 200, answer.body
    assert_served(daemon)


def test_A03_surrogates_in_the_json_text_of_a_call(daemon: Daemon) -> None:
    """The arguments of a call are JSON in a string: what is no text in there stays the text it was."""
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": "\\ud800"}'}}
    messages = [{"role": "assistant", "tool_calls": [call]}, {"role": "user", "content": "a"}]
    answer = daemon.post("/v1/chat/completions", {"model": NAME, "messages": messages, "max_tokens": 2})
    assert answer.status == 200, answer.body
    assert_served(daemon)


GOOD = json.dumps(ENDPOINTS["completions"].body(max_tokens=2)).encode()


@pytest.mark.parametrize(
    ("message", "status"),
    [
        (post(b"/v1/completions", b'{"prompt": "' + MARK.encode() + b'\xff"}'), 422),
        (post(b"/v1/completions", b'{"\xed\xa0\x80": "' + MARK.encode() + b'"}'), 422),
        (post(b"/v1/completions", b'{"prompt": "' + MARK.encode() + b'\xc3"}'), 422),
        (post(b"/v1/\xff" + MARK.encode(), GOOD), 400),
        (post(b"/v1/completions?\xff\x1b[31m" + MARK.encode(), GOOD), 400),
        (post(b"/v1/%ff%fe%ed%a0%80" + MARK.encode(), GOOD), 404),
        (post(b"/v2/models/%ff" + MARK.encode() + b"/generate", GOOD), 404),
        (post(b"/v1/completions", GOOD, b"X-\xff" + MARK.encode() + b": a"), 400),
        (post(b"/v1/completions", GOOD, b"req-id: \x1b[31m" + MARK.encode()), 400),
        (post(b"/v1/completions", GOOD, b"req-id: \xff\xfe" + MARK.encode()), 200),
        (post(b"/v1/completions", GOOD, b"X-A: \xff\xfe" + MARK.encode()), 200),
    ],
)
def test_A04_bytes_that_are_no_utf8(daemon: Daemon, message: bytes, status: int) -> None:
    """A value of a header that nobody reads is opaque bytes, as RFC 9110 has it; all else is refused."""
    answer = exchange(daemon.port, message)
    if status == 200:
        assert answer.status == 200, answer.body
    else:
        assert MARK not in refusal(answer, status)
    assert_served(daemon)


# -- compressed bodies --------------------------------------------------------------------------------


def bomb(gib: int) -> bytes:
    """gzip of so many GiB of zeros, without its end: a MiB for each."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    head = packer.compress(b"\0" * (1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(b"\0" * (1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return head + block * (gib << 10)


def processor_s(process: psutil.Process) -> float:
    return float(sum(process.cpu_times()[:2]))


@pytest.mark.parametrize(
    "headers",
    [
        [b"Content-Encoding: gzip"],
        [b"Content-Encoding: identity", b"Content-Encoding: gzip"],
        [b"Content-Encoding: gzip", b"Content-Encoding: identity"],
        [b"Content-Encoding: identity, gzip"],
        [b"content-encoding: GZIP"],
        [b"Content-Encoding: deflate"],
        [b"Content-Encoding: br"],
        [b"Content-Encoding: zstd"],
        [b"Content-Encoding: x-gzip"],
        [b"Content-Encoding: " + MARK.encode()],
    ],
)
def test_A06_a_compressed_body_is_refused_and_never_unpacked(daemon: Daemon, headers: list[bytes]) -> None:
    """Unpacking 8 GiB takes seconds of the processor, on the event loop, and refusing it takes none."""
    endpoint = daemon.child("endpoint")
    before = processor_s(endpoint)
    text = refusal(exchange(daemon.port, post(b"/v1/completions", bomb(8), *headers)), 422)
    assert "`Content-Encoding`" in text and MARK not in text
    assert_served(daemon)
    assert processor_s(endpoint) - before < 2.0


# -- blobs --------------------------------------------------------------------------------------------


def numpy_file() -> bytes:
    file = BytesIO()
    np.save(file, np.zeros(3))
    return file.getvalue()


@pytest.mark.parametrize("endpoint", [pytest.param(e, id=e.name) for e in ENDPOINTS.values()])
@pytest.mark.parametrize(
    ("blob", "kind"),
    [
        (pickle.dumps({MARK: 1}), b"application/x-pickle"),
        (numpy_file(), b"application/octet-stream"),
        (b"PK\x03\x04archive/data.pkl", b"multipart/form-data"),
    ],
    ids=["pickle", "numpy", "torch"],
)
def test_A17_serialized_objects_are_no_bodies(
    daemon: Daemon, endpoint: Endpoint, blob: bytes, kind: bytes
) -> None:
    message = post(endpoint.path.encode(), blob, b"Content-Type: " + kind)
    refusal(exchange(daemon.port, message), 422)
    assert_served(daemon, endpoint)


@pytest.mark.parametrize(
    "name", ["prompt_embeds", "inputs_embeds", "multi_modal_data", "mm_processor_kwargs"]
)
def test_A17_embeddings_are_nobody_s_prompt(daemon: Daemon, name: str) -> None:
    """Members that only other servers know have no effect here, whatever they hold."""
    blob: dict[str, Any] = {name: "gASVKAAAAAAAAACMBXBvc2l4lIwGc3lzdGVtlJOUjA1lY2hvIGN3bmVkID4mMpSFlFKULg=="}
    alone = daemon.post("/v1/completions", {"model": NAME, "max_tokens": 2, **blob})
    assert "`prompt`" in refusal(alone, 422)
    good = {"model": NAME, "prompt": "Once upon a time", "max_tokens": 4}
    with_it = daemon.post("/v1/completions", {**good, **blob})
    without = daemon.post("/v1/completions", good)
    assert with_it.json()["choices"] == without.json()["choices"]
    parts = [{"type": name, name: "gASVKA=="}]
    message = {"model": NAME, "messages": [{"role": "user", "content": parts}]}
    assert "`messages[0].content[0].type`" in refusal(daemon.post("/v1/chat/completions", message), 422)


def test_the_walk_finds_members_inside_of_others() -> None:
    """Else the tests above would be about less than they say."""
    paths = {path for adapter in load_adapters() for path, _ in adapter.body.walk()}
    assert {
        ("parameters", "seed"),
        ("inputs", "parameters", "seed"),
        ("stream_options", "include_usage"),
    } <= paths
    assert any(isinstance(member, Single) for _, member in load_adapters()[8].body.walk())
