"""Requests for scripts/fuzz_bodies.py: good bodies of every dialect, and what is done to spoil them.

Case (dialect, number) is always the same bytes, so that a number is all one needs to see a finding again.
A body is spoilt in up to three layers: its JSON tree, the bytes of its text, and the HTTP around it.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

HOST = "127.0.0.1"
NAME = "mindie-tiny"  # the served model
TRITON = f"/v2/models/{NAME}"
Json = dict[str, Any]

# --- good requests -------------------------------------------------------------------------------------

SCHEMA: Json = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "array", "items": {"enum": [1, 2, None]}}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL: Json = {
    "type": "function",
    "function": {"name": "get_weather", "description": "of a city", "parameters": SCHEMA},
}
CALL: Json = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'},
}
PART: Json = {"type": "text", "text": "Once"}
USER: Json = {"role": "user", "content": "Who are you?"}
CHAT: Json = {"model": NAME, "messages": [USER], "max_tokens": 4}
COMPLETION: Json = {"model": NAME, "prompt": "Once upon a time", "max_tokens": 4}
TGI: Json = {"inputs": "Once upon a time", "parameters": {"max_new_tokens": 4}}
TEXT: Json = {"text_input": "Once upon a time", "parameters": {"max_new_tokens": 4}}
TENSOR: Json = {
    "id": "t1",
    "inputs": [{"name": "input0", "shape": [1, 3], "datatype": "UINT32", "data": [300, 301, 302]}],
    "outputs": [{"name": "output0"}],
    "parameters": {"max_new_tokens": 4, "temperature": 0.7, "seed": 3},
}
_SAMPLING: Json = {
    "temperature": 0.8, "top_p": 0.9, "top_k": 20, "seed": 1, "presence_penalty": 0.5, "n": 2, "best_of": 2,
    "frequency_penalty": 0.5, "repetition_penalty": 1.1, "stop": ["xyz", "\n\n"], "stop_token_ids": [5, 9],
    "ignore_eos": True, "min_p": 0.1, "min_tokens": 1, "logit_bias": {"300": 5}, "skip_special_tokens": False,
    "include_stop_str_in_output": True,
}  # fmt: skip
_PARAMETERS: Json = {
    "do_sample": True, "temperature": 0.8, "top_k": 5, "top_p": 0.9, "typical_p": 0.5, "seed": 7,
    "repetition_penalty": 1.2, "max_new_tokens": 4, "details": True, "watermark": True,
}  # fmt: skip
_STREAM: Json = {"stream": True, "stream_options": {"include_usage": True}}
_FORMAT: Json = {"type": "json_schema", "json_schema": {"name": "trip", "schema": SCHEMA, "strict": True}}

Good = tuple[str, Json]  # path, body
GOOD: dict[str, list[Good]] = {
    "chat": [
        ("/v1/chat/completions", body)
        for body in (
            CHAT,
            {**CHAT, **_STREAM},
            {**CHAT, **_SAMPLING, "logprobs": True, "top_logprobs": 3},
            {**CHAT, "tools": [TOOL], "tool_choice": "auto", "parallel_tool_calls": False},
            {**CHAT, **_STREAM, "tools": [TOOL],
             "tool_choice": {"type": "function", "function": {"name": "get_weather"}}},
            {**CHAT, "tools": [TOOL], "tool_choice": "required",
             "messages": [{"role": "system", "content": "Be brief."}, USER,
                          {"role": "assistant", "content": None, "tool_calls": [CALL]},
                          {"role": "tool", "tool_call_id": "call_1", "content": "sunny"}, USER]},
            {**CHAT, "response_format": _FORMAT},
            {**CHAT, **_STREAM, "response_format": {"type": "json_object"}},
            {**CHAT, "messages": [{"role": "user", "content": [PART, PART]}]},
            {**CHAT, "n": 2, "use_beam_search": True},
            {**CHAT, "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}",
             "prompt_logprobs": 2, "chat_template_kwargs": {"enable_thinking": True, "thinking_budget": 5}},
            {**CHAT, "structured_outputs": {"regex": "[a-z]{1,5}"}},
            {**CHAT, "guided_choice": ["yes", "no"]},
        )
    ],
    "completions": [
        ("/v1/completions", body)
        for body in (
            COMPLETION,
            {**COMPLETION, **_STREAM, "logprobs": 2},
            {**COMPLETION, **_SAMPLING},
            {**COMPLETION, "prompt": [300, 301, 302], "echo": True},
            {**COMPLETION, "prompt": ["one", "two"], **_STREAM},
            {**COMPLETION, "prompt": [[300, 301], [302]], "n": 2, "temperature": 1.0},
            {**COMPLETION, "n": 2, "use_beam_search": True, "logprobs": 1},
            {**COMPLETION, "prompt_logprobs": 1, "suffix": None},
            {**COMPLETION, "response_format": _FORMAT},
            {**COMPLETION, "structured_outputs": {"grammar": 'root ::= "a" | "b" root'}},
            {**COMPLETION, "guided_json": SCHEMA},
            {**COMPLETION, "structured_outputs": {"choice": ["red", "green"]}, "stream": True},
        )
    ],
    "vllm": [
        ("/generate", body)
        for body in (
            {"prompt": "Once upon a time", "max_tokens": 4},
            {"prompt": "Once upon a time", "max_tokens": 4, "stream": True},
            {"prompt": "Once", "max_tokens": 4, **_SAMPLING},
            {"prompt": [PART], "max_tokens": 4, "stream": True, "n": 2, "temperature": 1.0},
            {"prompt": "Once", "max_tokens": 4, "model": NAME, "use_beam_search": True, "logprobs": 3},
        )
    ],
    "tgi": [
        ("/generate", TGI),
        ("/generate_stream", TGI),
        ("/", TGI),
        ("/", {**TGI, "stream": True}),
        ("/generate_stream", {"inputs": "a", "parameters": {**_PARAMETERS, "stop": ["xyz"], "truncate": 2}}),
        ("/generate", {"inputs": [PART], "parameters": {"decoder_input_details": True}}),
        ("/generate",
         {"inputs": "a", "parameters": {**_PARAMETERS, "return_full_text": True, "adapter_id": "None"}}),
    ],
    "triton": [
        (f"{TRITON}/generate", TEXT),
        (f"{TRITON}/generate_stream", {**TEXT, "id": "s1"}),
        (f"{TRITON}/generate", {"id": "a1", "text_input": "Once", "details": True, "parameters": {
            **_PARAMETERS, "perf_stat": True, "priority": 2, "timeout": 9}}),
        (f"{TRITON}/generate_stream",
         {"text_input": [PART], "parameters": {**_PARAMETERS, "batch_size": 1}}),
        (f"{TRITON}/stopInfer", {"id": "nobody"}),
    ],
    "tensor": [
        (f"{TRITON}/infer", TENSOR),
        (f"{TRITON}/infer", {"inputs": [{**TENSOR["inputs"][0], "shape": [3], "parameters": _PARAMETERS}],
                             "outputs": [{"name": ""}]}),
    ],
    "native": [
        ("/infer", {**TGI, "stream": False}),
        ("/infer", {**TGI, "stream": True}),
        ("/infer_token",
         {"input_id": [300, 301, 302], "parameters": {**_PARAMETERS, "priority": 1, "timeout": 5}}),
        ("/infer", {"inputs": [PART], "stream": True, "parameters": _PARAMETERS}),
    ],
    "tokenizer": [
        ("/v1/tokenizer", {"inputs": "what is your name?"}),
        ("/v1/tokenizer", {"inputs": "what is your name?", "do_decode": False}),
    ],
}  # fmt: skip


# --- JSON with what json cannot write ------------------------------------------------------------------


class Raw(bytes):
    """Bytes that stand in a body as they are."""


class Pairs(list[tuple[Any, Any]]):
    """An object whose member names may repeat."""


def dump(value: Any) -> bytes:
    """JSON bytes of a tree that may hold Raw and Pairs."""
    if isinstance(value, Raw):
        return bytes(value)
    if isinstance(value, dict | Pairs):
        members = value.items() if isinstance(value, dict) else value
        return b"{" + b",".join(dump(name) + b":" + dump(member) for name, member in members) + b"}"
    if isinstance(value, list):
        return b"[" + b",".join(map(dump, value)) + b"]"
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything inside of a tree of dicts and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, member in list(items):
        yield value, key
        if not isinstance(member, Pairs):
            yield from places(member)


# --- layer one: the tree -------------------------------------------------------------------------------

_NUMBERS: list[Any] = [
    0, 1, -1, 2, 20, 21, 128, 129, 65535, 65536, 2**31 - 1, 2**31, -(2**31) - 1, 2**53 + 1, 2**63, 2**64 - 1,
    2**64, 10**30, 0.0, -0.0, 0.5, 1.0, 1.0000001, 2.0, -2.0, 1e-45, 1e308, 5e-324, Raw(b"1e400"),
    Raw(b"-1e400"), Raw(b"NaN"), Raw(b"Infinity"), Raw(b"-Infinity"), Raw(b"1" * 5000), Raw(b"0" * 9),
    Raw(b"01"), Raw(b"1."), Raw(b".5"), Raw(b"+1"), Raw(b"0x10"), Raw(b"1e5"), Raw(b"1E+2"), Raw(b"-0"),
]  # fmt: skip
_TEXTS: list[Any] = [
    "", " ", "\x00", "0", "true", "null", "None", "\n", "\x7f\x1b[31m", "\u200b", "\u202e", "\ufeff",
    "\ufffd", "é", "e\u0301", "你好", "🎉", "👩‍👩‍👧‍👦", "\U0010ffff", "<|im_end|>", "<|im_start|>system",
    "<tool_call>", "</think>", "{{ 7*7 }}",
    "{% for x in range(9999999) %}x{% endfor %}", "{{ messages.__class__ }}", "../../etc/passwd", "a.jinja",
    "(a+)+$", "(?=x)", "[", "\\", "a{1000000}", "root ::= root", "auto", "required", "none", "json_object",
    NAME, "mindie-tinx", "x" * 300, "word " * 3000, "é" * 33000, "🎉" * 5000, "x" * 1_200_000,
    Raw(b'"\\ud800"'), Raw(b'"\\udc00\\ud800"'), Raw(b'"\xff\xfe"'), Raw(b'"\xc3"'), Raw(b'"\xed\xa0\x80"'),
    Raw(b'"\xf5\x80\x80\x80"'), Raw(b'"\xc0\xaf"'), Raw(b'"\\u00"'), Raw(b'"\\x41"'), Raw(b'"a\nb"'),
    Raw(b"'a'"),
]  # fmt: skip
_OTHERS: list[Any] = [
    None, True, False, [], {}, [None], [[]], [{}], {"": ""}, [1, "a", None], [0] * 2000, ["a"] * 300,
    [-1], [2**40], [2048], {"type": "object"}, {"$ref": "#"}, {"type": ["string", "null"]}, {"enum": []},
    {"name": "x"}, {"type": "text"}, {"type": "image_url", "image_url": {"url": "http://127.0.0.1/x.png"}},
    {"pattern": "(a|a)*b"}, {"role": "user"}, Pairs([("a", 1), ("a", 2)]), Raw(b""), Raw(b"undefined"),
    Raw(b"[1,]"),
    Raw(b"[" * 70 + b"]" * 70), Raw(b"[" * 50000), Raw(b'{"a":' * 66 + b"1" + b"}" * 66),
    Raw(b'{"a":' * 60 + b"1" + b"}" * 60), Raw(b"/* c */ 1"),
]  # fmt: skip
_EXPENSIVE = 0.02  # share of the values of a megabyte that is kept


def _hostile(rng: random.Random) -> Any:
    value = rng.choice(rng.choice((_NUMBERS, _TEXTS, _OTHERS)))
    if isinstance(value, str) and len(value) > 10**6 and rng.random() > _EXPENSIVE:
        return ""
    return copy.deepcopy(value)


def _near(value: Any, rng: random.Random) -> Any:
    """Something one step from a legal value."""
    if isinstance(value, bool):
        return rng.choice((int(value), str(value).lower(), not value))
    if isinstance(value, int):
        return rng.choice(
            (value + 1, value - 1, -value, float(value), value + 0.5, str(value), value * 2**32, [value])
        )
    if isinstance(value, float):
        return rng.choice((-value, 0.0, 1 / value if value else 1.0, value * 1e10, str(value), int(value)))
    if isinstance(value, str):
        return rng.choice(
            (value + "\x00", value[:-1], value.upper(), value * 200, [value], {"text": value}, f" {value}")
        )
    if isinstance(value, list):
        return rng.choice(
            ([], value * 50, [value], [*value, None], value[:-1], {"0": value}, [*value, "x", 1.5])
        )
    if isinstance(value, dict):
        return rng.choice(([value], {}, {**value, "x": 1}, list(value), {**value, "type": "x"}))
    return _hostile(rng)


def _fields() -> list[tuple[str, Any]]:
    """Every member of every good body, and some that only other servers know."""
    found = {
        (str(key), json.dumps(container[key])): container[key]
        for goods in GOOD.values()
        for _, body in goods
        for container, key in places(body)
        if isinstance(container, dict)
    }
    more: Json = {
        "max_completion_tokens": 3, "user": "u", "metadata": {}, "functions": [], "audio": None,
        "length_penalty": 0.5, "guided_regex": "a+", "guided_grammar": 'root ::= "x"', "stream": True,
        "structured_outputs": {"json": SCHEMA}, "return_tokens_as_token_ids": True, "best_of": 3,
        "echo": True, "add_generation_prompt": False, "continue_final_message": True, "lora": "a",
        "reasoning_effort": "low", "request_id": "r", "top_n_tokens": 2, "decoder_input_details": True,
        "grammar": {"type": "regex", "value": "a"},
    }  # fmt: skip
    return [(name, value) for (name, _), value in found.items()] + list(more.items())


_FIELDS = _fields()


def _spoil_tree(body: Json, rng: random.Random) -> Any:
    container, key = rng.choice(list(places(body)) or [({}, "x")])
    value = container[key] if container else None
    match rng.choices("HNDRLSP", (20, 25, 8, 8, 30, 6, 3))[0]:
        case "H":
            container[key] = _hostile(rng)
        case "N":
            container[key] = _near(value, rng)
        case "D":
            del container[key]
        case "R" if isinstance(container, dict):  # another name
            name = str(key)
            other = rng.choice(
                (name.upper(), f"{name}s", name[:-1], f" {name}", rng.choice(_FIELDS)[0], "\x00", "é")
            )
            container[other] = container.pop(key)
        case "L":  # something legal elsewhere
            name, member = rng.choice(_FIELDS)
            nested = [c for c, _ in places(body) if isinstance(c, dict)] or [body]
            rng.choice([body, *nested])[name] = copy.deepcopy(member)
        case "S":  # one value in another's place
            other_container, other_key = rng.choice(list(places(body)))
            container[key] = copy.deepcopy(other_container[other_key])
        case _:  # the same name twice
            pairs = Pairs(body.items())
            pairs.append(rng.choice((*pairs, (key, _hostile(rng)))))
            return pairs
    return body


# --- layer two: the bytes ------------------------------------------------------------------------------


def _spoil_bytes(raw: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(raw) + 1)
    end = min(len(raw), at + rng.choice((1, 2, 9)))
    noise = bytes(rng.choice(b'{}[]",:\\\x00\xff\xc3\xed0e.-tfn u') for _ in range(rng.choice((1, 3))))
    spoilt: list[Callable[[], bytes]] = [
        lambda: raw[:at],
        lambda: raw[at:],
        lambda: raw[:at] + raw[end:],
        lambda: raw[:at] + noise + raw[at:],
        lambda: raw[:at] + noise + raw[end:],
        lambda: raw[:at] + raw[at:end] * 3 + raw[end:],
        lambda: raw + rng.choice((b"x", b"{}", b"\x00", b" \n ", raw)),
        lambda: b"\xef\xbb\xbf" + raw,
        lambda: raw.decode("utf-8", "replace").encode(rng.choice(("utf-16", "utf-32-le", "utf-7"))),
        lambda: rng.choice((b"", b"null", b"[]", b'"a"', b"1", b"{", b"{}", b" ", b"[" + raw + b"]")),
        lambda: b"".join(bytes([b]) + b" " if b in b"{}[],:" else bytes([b]) for b in raw),
    ]
    return rng.choice(spoilt)()


# --- layer three: HTTP ---------------------------------------------------------------------------------

_LONGEST_HEADER = 8000  # of which the server reads a bit more


@dataclass(frozen=True, slots=True)
class Case:
    dialect: str
    number: int
    path: str
    message: bytes  # the whole request
    framed: bool = True  # HTTP whose head and body agree: else no answer is owed
    lone: bool = False  # wants a connection of its own


def _message(
    method: str, path: str, headers: list[tuple[str, str]], payload: bytes, version: str = "1.1"
) -> bytes:
    lines = [
        f"{method} {path} HTTP/{version}",
        f"Host: {HOST}",
        *(f"{name}: {value}" for name, value in headers),
    ]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + payload


def _chunked(payload: bytes, rng: random.Random) -> bytes:
    cuts = sorted({rng.randrange(len(payload) + 1) for _ in range(rng.randrange(5))} | {0, len(payload)})
    pieces = [payload[a:b] for a, b in pairwise(cuts)]
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces if piece) + b"0\r\n\r\n"


def _spoil_http(dialect: str, number: int, path: str, payload: bytes, rng: random.Random) -> Case:
    length = ("Content-Length", str(len(payload)))
    json_type = ("Content-Type", "application/json")
    extra = rng.choice([
        ("Content-Type", rng.choice(("text/plain", "application/x-www-form-urlencoded", "multipart/form-data",
                                     "x", "", "application/json; charset=utf-16", "a/json; charset=nope"))),
        ("Content-Encoding", rng.choice(("gzip", "deflate", "br", "identity", "x"))),
        ("Accept", rng.choice(("text/html", "*/*;q=0", "\x80"))), ("Accept-Encoding", "gzip, br"),
        ("Connection", rng.choice(("close", "keep-alive", "upgrade"))), ("Upgrade", "websocket"),
        ("req-id", rng.choice(("", "a" * 5000, "\xe9", "../x", "1"))), ("Cookie", "a=b; c"),
        ("Expect", rng.choice(("100-continue", "x"))), ("X-Http-Method-Override", "GET"),
        ("Authorization", "Bearer " + "x" * 2000), ("X-Long", "y" * rng.choice((100, 7000, 9000, 70000))),
        ("Range", "bytes=0-1"), ("If-None-Match", "*"),
    ])  # fmt: skip
    kind = rng.randrange(12)
    if kind < 5:
        headers = [header for header in (json_type, length) if header[0] != extra[0]]
        message = _message("POST", path, [*headers, extra], payload)
        return Case(dialect, number, path, message, framed=len(extra[1]) < _LONGEST_HEADER, lone=True)
    if kind < 7:
        headers = [json_type, ("Transfer-Encoding", "chunked")]
        return Case(dialect, number, path, _message("POST", path, headers, _chunked(payload, rng)), lone=True)
    if kind == 7:
        method = rng.choice(("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "post", "QUERY"))
        return Case(dialect, number, path, _message(method, path, [length], payload), lone=True)
    if kind == 8:
        other = rng.choice(
            (
                path + "/",
                path.upper(),
                f"{path}?stream=true&x=%ff",
                path.replace(NAME, "other"),
                "//",
                f"/v1/..{path}",
                f"{path}%00",
                path.replace("tiny", "ti%6ey"),
                f"http://{HOST}{path}",
                "*",
            )
        )
        return Case(dialect, number, other, _message("POST", other, [length], payload), lone=True)
    if kind == 9:
        return Case(
            dialect, number, path, _message("POST", path, [json_type, length], payload, "1.0"), lone=True
        )
    broken = rng.choice([
        [("Content-Length", str(len(payload) + rng.choice((1, 500))))],
        [("Content-Length", str(max(0, len(payload) - 5)))],
        [("Content-Length", rng.choice(("-1", "x", "1e3", "", "9" * 30)))],
        [length, ("Content-Length", "3")],
        [length, ("Transfer-Encoding", "chunked")],
        [("Transfer-Encoding", "chunked")],
        [("Transfer-Encoding", "gzip")],
        [length, ("Bad Name", "x")],
        [],
    ])  # fmt: skip
    return Case(
        dialect, number, path, _message("POST", path, [json_type, *broken], payload), framed=False, lone=True
    )


# --- a case --------------------------------------------------------------------------------------------


def good_message(path: str, body: Json) -> bytes:
    payload = dump(body)
    return _message("POST", path, [("Content-Length", str(len(payload)))], payload)


def make_case(dialect: str, number: int, seed: int = 0) -> Case:
    """One spoilt request; now and then it happens to be a legal one."""
    rng = random.Random(f"{seed}:{dialect}:{number}")
    path, good = rng.choice(GOOD[dialect])
    tree: Any = copy.deepcopy(good)
    layers = rng.random()
    if layers < 0.95:
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            if isinstance(tree, dict) and tree:
                tree = _spoil_tree(tree, rng)
    payload = dump(tree)
    if layers > 0.87:
        payload = _spoil_bytes(payload, rng)
    if rng.random() < 0.1:
        return _spoil_http(dialect, number, path, payload, rng)
    return Case(
        dialect, number, path, _message("POST", path, [("Content-Length", str(len(payload)))], payload)
    )
