"""What is declared of every body is what its reader reads: names, types, ranges, defaults."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from endpoint.declarations import Declaration, Integer, Number, Object, RequestBody, Single
from endpoint.lora_api import LOAD_BODY, UNLOAD_BODY, parse_load, parse_unload
from endpoint.protocols.base import ProtocolAdapter
from endpoint.protocols.registry import load_adapters
from endpoint.protocols.triton import STOP_INFER_BODY, stop_infer_id
from endpoint.token_count import COUNT_BODY, parse_count
from engine.errors import GenerationRefused, InvalidRequest, ServerError
from tests.endpoint.samples import context, model_info

Json = dict[str, Any]
Path_ = tuple[str, ...]

MODEL = model_info("llama")
SAMPLES: list[Any] = [True, 7, 1.5, "x", "", [], [1.5], {}, {"x": 1}]


class Reader(NamedTuple):
    """One body and the function that reads it. `bodies`: good ones, which together have every member read."""

    body: RequestBody
    read: Callable[[Mapping[str, Any]], object]
    bodies: list[Json]


def parse_and_reply(adapter: ProtocolAdapter) -> Callable[[Mapping[str, Any]], object]:
    def read(body: Mapping[str, Any]) -> object:
        request = adapter.parse(body, MODEL, {"model": "llama"})
        adapter.reply(request, body, context())
        return request

    return read


def examples(body: RequestBody) -> list[Json]:
    found = body.examples.values()
    return [{**example, "model": "llama"} if "model" in example else example for example in found]


# good bodies with the objects that no example has
MORE: dict[str, list[Json]] = {
    "openai_chat": [
        {
            "model": "llama",
            "messages": [{"role": "user", "content": "hi"}],
            "chat_template_kwargs": {"enable_thinking": True, "thinking_budget": 5},
        }
    ],
    "triton_infer": [
        {
            "inputs": [
                {"name": "i", "shape": [2], "datatype": "UINT32", "data": [5, 6], "parameters": {"top_k": 2}}
            ],
            "outputs": [{"name": ""}],
        }
    ],
}

READERS: dict[str, Reader] = {
    **{
        adapter.name: Reader(
            adapter.body, parse_and_reply(adapter), [*examples(adapter.body), *MORE.get(adapter.name, [])]
        )
        for adapter in load_adapters()
    },
    "tokenizer": Reader(COUNT_BODY, parse_count, examples(COUNT_BODY)),
    "stop_infer": Reader(STOP_INFER_BODY, stop_infer_id, examples(STOP_INFER_BODY)),
    "load_lora": Reader(
        LOAD_BODY, lambda body: parse_load(body, "llama", Path("/data")), examples(LOAD_BODY)
    ),
    "unload_lora": Reader(UNLOAD_BODY, parse_unload, examples(UNLOAD_BODY)),
}
each_reader = pytest.mark.parametrize("reader", READERS.values(), ids=READERS)


def members(body: RequestBody) -> list[tuple[Path_, Declaration]]:
    """Declared members that have an effect."""
    return [(path, member) for path, member in body.walk() if not member.ignored]


def having(body: Json, root: RequestBody, path: Path_, value: Any) -> Json:
    """A copy of `body` with `value` at `path`; objects on the way are made."""
    body = copy.deepcopy(body)
    holder: Json = body
    inside: Object = root
    for name in path[:-1]:
        inside = {member.name: member for member in inside.members if isinstance(member, Object)}[name]
        single = isinstance(inside, Single)
        below = holder.get(name) or ([{}] if single else {})
        holder[name] = below
        holder = below[0] if single else below
    holder[path[-1]] = value
    return body


def without(body: Json, root: RequestBody, path: Path_) -> Json:
    marked = having(body, root, path, ...)

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: strip(item) for key, item in value.items() if item is not ...}
        return [strip(item) for item in value] if isinstance(value, list) else value

    stripped: Json = strip(marked)
    return stripped


VALIDATORS = {name: Draft202012Validator(reader.body.schema()) for name, reader in READERS.items()}


def fits(reader: Reader, body: Json) -> bool:
    """Whether the schema allows the body."""
    (name,) = [name for name, other in READERS.items() if other is reader]
    return VALIDATORS[name].is_valid(body)


def refusal(reader: Reader, body: Json) -> ServerError | None:
    try:
        reader.read(body)
    except (InvalidRequest, GenerationRefused) as error:
        return error
    return None


# -- names -------------------------------------------------------------------------------------------


class Recorder(Mapping[str, Any]):
    """An object that notes which of its members, and of its declared objects' members, are looked at."""

    def __init__(self, body: Mapping[str, Any], declared: Object, path: Path_, seen: set[Path_]) -> None:
        self._body = body
        self._objects = {m.name: m for m in declared.members if isinstance(m, Object)}
        self._path = path
        self._seen = seen

    def __getitem__(self, name: str) -> Any:
        here = (*self._path, name)
        self._seen.add(here)
        value = self._body[name]
        inside = self._objects.get(name)
        if inside is None or value is None:
            return value
        if isinstance(inside, Single):
            return [Recorder(item, inside, here, self._seen) for item in value]
        return Recorder(value, inside, here, self._seen)

    def __iter__(self) -> Iterator[str]:
        raise AssertionError(f"{self._path} is read member by member, whatever they are called")

    def __len__(self) -> int:
        return len(self._body)


def seen_in(reader: Reader, bodies: list[Json]) -> set[Path_]:
    seen: set[Path_] = set()
    for body in bodies:
        reader.read(Recorder(body, reader.body, (), seen))
    return seen


@each_reader
def test_all_that_is_read_is_declared_and_all_that_is_declared_is_read(reader: Reader) -> None:
    seen = seen_in(reader, reader.bodies)
    assert seen == {path for path, _ in members(reader.body)}


@each_reader
def test_nothing_is_declared_twice_and_everything_has_a_meaning(reader: Reader) -> None:
    paths = [path for path, _ in reader.body.walk()]
    assert len(paths) == len(set(paths))
    for path, member in reader.body.walk():
        assert member.meaning.endswith((".", "`")) and len(member.meaning) < 120, path
    assert reader.body.examples


# -- types, ranges and defaults ----------------------------------------------------------------------


@each_reader
def test_good_bodies_fit_the_schema(reader: Reader) -> None:
    Draft202012Validator.check_schema(reader.body.schema())
    for body in reader.bodies:
        assert refusal(reader, body) is None
        assert fits(reader, body)


def just_outside(low: float, open_end: bool, step: float, whole: bool) -> tuple[float, float]:
    """The last legal value at one end of a range, and its illegal neighbour."""
    if whole:
        return int(low), int(low + step)
    beyond = math.nextafter(low, math.inf * step)
    return (math.nextafter(low, -math.inf * step), low) if open_end else (low, beyond)


def borders(member: Integer | Number) -> Iterator[tuple[Any, Any]]:
    legal, whole = member.legal, isinstance(member, Integer)
    yield just_outside(legal.low, legal.low_open, -1, whole)
    if legal.high != math.inf:
        yield just_outside(legal.high, legal.high_open, 1, whole)


NUMERIC = [
    pytest.param(reader, path, member, id=f"{name}-{'.'.join(path)}")
    for name, reader in READERS.items()
    for path, member in members(reader.body)
    if isinstance(member, Integer | Number)
]


@pytest.mark.parametrize(("reader", "path", "member"), NUMERIC)
def test_a_declared_range_is_the_one_that_is_enforced(
    reader: Reader, path: Path_, member: Integer | Number
) -> None:
    plain = without(reader.bodies[0], reader.body, path)
    for inside, outside in borders(member):
        assert refusal(reader, having(plain, reader.body, path, inside)) is None, inside
        wrong = having(plain, reader.body, path, outside)
        refused = refusal(reader, wrong)
        assert isinstance(refused, InvalidRequest) and path[-1] in str(refused), outside
        assert not fits(reader, wrong)


@each_reader
def test_what_the_schema_of_a_member_refuses_its_reader_refuses(reader: Reader) -> None:
    for path, member in members(reader.body):
        schema = Draft202012Validator(member.schema())
        wrong = [value for value in SAMPLES if not schema.is_valid(value)]
        assert len(wrong) > len(SAMPLES) // 3, f"the schema of {path} says nothing"
        for value in wrong:
            body = having(reader.bodies[0], reader.body, path, value)
            refused = refusal(reader, body)
            assert isinstance(refused, InvalidRequest), (path, value)
            assert path[-1] in str(refused), (path, value)


@each_reader
def test_null_is_the_same_as_not_sent_where_nothing_is_required(reader: Reader) -> None:
    for path, member in members(reader.body):
        for base in reader.bodies:
            null = having(base, reader.body, path, None)
            absent = without(base, reader.body, path)
            assert fits(reader, null) is fits(reader, absent), path
            assert (refusal(reader, null) is None) is (refusal(reader, absent) is None), path
            if member.required:
                assert refusal(reader, absent) is not None and not fits(reader, absent)


@each_reader
def test_a_declared_default_changes_nothing(reader: Reader) -> None:
    base = reader.bodies[0]
    for path, _ in members(reader.body):
        if path[-1] == "seed":
            base = having(base, reader.body, path, 1)
        if path == ("id",):
            base = {**base, "id": "a"}
    for path, member in members(reader.body):
        if member.default is None or isinstance(member.default, str):
            continue
        absent = without(base, reader.body, path)
        sent = having(absent, reader.body, path, member.default)
        assert reader.read(sent) == reader.read(absent), path


@each_reader
def test_ignored_members_are_ignored_whatever_they_are(reader: Reader) -> None:
    names = [path for path, member in reader.body.walk() if member.ignored]
    base = without(reader.bodies[0], reader.body, ("unknown",))
    for value in (*SAMPLES, None):
        body = base
        for path in [*names, ("something else",)]:
            body = having(body, reader.body, path, value)
        assert refusal(reader, body) is None
        assert fits(reader, body)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["", "text", "function", "user", "assistant", "a b", "json_object"])
    | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "text", "role", "content", "function", "name", "1"]), inner, max_size=3
        )
    ),
    max_leaves=5,
)


@settings(max_examples=60, deadline=None)
@each_reader
@given(data=st.data())
def test_what_the_schema_of_a_body_refuses_its_reader_refuses(reader: Reader, data: st.DataObject) -> None:
    body = data.draw(st.sampled_from(reader.bodies))
    paths = st.sampled_from([path for path, _ in members(reader.body)])
    for path in data.draw(st.lists(paths, min_size=1, max_size=3, unique=True)):
        try:
            body = having(body, reader.body, path, data.draw(VALUES))
        except (TypeError, AttributeError, KeyError):
            continue  # the draw before put something else where this member's object was
    refused = refusal(reader, body)
    if not fits(reader, body):
        assert refused is not None, json.dumps(body)
