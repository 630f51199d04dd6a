"""GET /docs: the OpenAPI document as one page to read."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from endpoint.declarations import Json
from endpoint.docs_template import TABLES, TEMPLATE
from endpoint.http_errors import STATUS
from endpoint.operations import EVENTS

# as scripts/make_certs.py writes them
_CERTIFICATES = "--cacert client/ca.pem --cert client/client.pem --key client/client.key.pem "
_ONE_LINE = 100  # characters of a body that is shown on one
_DEPTH = 3  # of members shown in a table; deeper ones are told in words
_PATH_VALUES = {"{seconds}": "10"}


_POWERS = {2**31 - 1: "2³¹-1", 2**64 - 1: "2⁶⁴-1"}


class Row(NamedTuple):
    """One field of a table. `inside`: the names that lead to it."""

    inside: str
    name: str
    value: str  # its type and range
    default: str
    required: bool
    nullable: bool
    meaning: str


def render(document: Json, model_name: str) -> str:
    """`model_name`: what the examples ask for."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["coded"] = _coded
    tables = environment.from_string(TABLES).module
    return environment.from_string(TEMPLATE).render(
        title=document["info"]["title"],
        version=document["info"]["version"],
        description=document["info"]["description"],
        planes=[_plane(document, tag, model_name) for tag in document["tags"]],
        errors=_error_rows(document),
        tables=tables,
    )


def _coded(text: str) -> Markup:
    """Escaped, with what stands between backticks as code."""
    parts = (escape(part) for part in text.split("`"))
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if index % 2 else part for index, part in enumerate(parts)
    )


def _plane(document: Json, tag: Json, model_name: str) -> Json:
    listed = [
        (path, item["servers"][0]["url"], method, item[method])
        for path, item in document["paths"].items()
        for method in ("get", "post")
        if method in item and tag["name"] in item[method]["tags"]
    ]
    families: dict[str, list[Json]] = {}
    for path, url, method, operation in listed:
        shown = _operation(document, path, url, method, operation, model_name)
        families.setdefault(operation["x-family"], []).append(shown)
    return {
        "name": tag["name"],
        "meaning": tag["description"],
        "url": listed[0][1],
        "families": [{"name": name, "operations": shown} for name, shown in families.items()],
    }


def _operation(document: Json, path: str, url: str, method: str, operation: Json, model_name: str) -> Json:
    address = path.replace("{model}", model_name)
    for name, value in _PATH_VALUES.items():
        address = address.replace(name, value)
    content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    bodies = [_body(document, schema) for schema in _alternatives(content.get("schema", {}))]
    examples = [
        {"title": title, "command": curl(url + address, example["value"])}
        for title, example in content.get("examples", {}).items()
    ]
    answers = [
        {"status": status, "meaning": _meaning(_resolved(document, response))}
        for status, response in operation["responses"].items()
    ]
    return {
        "id": operation["operationId"],
        "method": method,
        "path": path,
        "summary": operation["summary"],
        "parameters": [_parameter(parameter) for parameter in operation.get("parameters", [])],
        "bodies": bodies,
        "examples": examples or [{"title": "", "command": curl(url + address)}],
        "answers": answers,
        "shapes": list(_shapes(document, operation["responses"].get("200", {}).get("content", {}))),
    }


def curl(url: str, body: Json | None = None) -> str:
    """The command for a POSIX shell; a plain GET without `body`."""
    command = f"curl {_CERTIFICATES if url.startswith('https:') else ''}"
    if body is None:
        return f"{command}{shlex.quote(url)}"
    text = json.dumps(body, ensure_ascii=False)
    if len(text) > _ONE_LINE:
        members = (f"{json.dumps(name)}: {json.dumps(body[name], ensure_ascii=False)}" for name in body)
        text = "{\n    " + ",\n    ".join(members) + "\n  }"
    stream = "-N " if body.get("stream") is True or url.endswith("_stream") else ""
    return f"{command}{stream}{shlex.quote(url)} \\\n  -d {shlex.quote(text)}"


def _meaning(response: Json) -> str:
    kinds = list(response.get("content", {}))
    plain = kinds in ([], ["application/json"])
    return str(response["description"]) if plain else f"{response['description']}: {' or '.join(kinds)}"


def _parameter(parameter: Json) -> Row:
    schema = {**parameter["schema"], "description": parameter["description"]}
    return _row("", parameter["name"], schema, parameter["required"])


def _body(document: Json, schema: Json) -> Json:
    resolved = _resolved(document, schema)
    return {
        "meaning": resolved["description"],
        "rows": list(rows(document, resolved)),
        "ignored": [name for name, member in _ignored(resolved)],
    }


def _ignored(schema: Json, prefix: str = "") -> Iterator[tuple[str, Json]]:
    for name, member in schema.get("properties", {}).items():
        if member.get("x-ignored"):
            yield prefix + name, member
        yield from _ignored(member, f"{prefix}{name}.")


def _shapes(document: Json, content: Json) -> Iterator[Json]:
    for content_type, media in content.items():
        names = media.get("x-frames") or [
            schema["$ref"].rpartition("/")[2] for schema in _alternatives(media["schema"])
        ]
        for name in names:
            schema = document["components"]["schemas"][name]
            found = list(rows(document, schema))
            if found:
                kind = "A frame" if content_type == EVENTS else "The answer"
                yield {"title": f"{kind}: {name}", "rows": found}


def rows(document: Json, schema: Json, inside: str = "", depth: int = 1) -> Iterator[Row]:
    """The members of an object, or of the objects in an array, and theirs."""
    schema = _resolved(document, schema)
    if _types(schema) == ["array"]:
        for item in _alternatives(schema.get("items", {})):
            yield from rows(document, item, f"{inside.removesuffix('.')}[].", depth)
        return
    needed = schema.get("required", [])
    for name, member in schema.get("properties", {}).items():
        if member.get("x-ignored"):
            continue
        inner = _resolved(document, member)
        yield _row(inside, name, {**inner, **member}, name in needed)
        if depth < _DEPTH:
            for alternative in _alternatives(inner):
                yield from rows(document, alternative, f"{inside}{name}.", depth + 1)


def _row(inside: str, name: str, schema: Json, required: bool) -> Row:
    default = schema.get("x-default", schema.get("default", ""))
    shown = default if isinstance(default, str) else json.dumps(default)
    nullable = "null" in schema.get("type", ()) or {"type": "null"} in schema.get("anyOf", ())
    nullable = nullable or None in schema.get("enum", ())
    return Row(inside, name, _value(schema), shown, required, nullable, schema.get("description", ""))


def _alternatives(schema: Json) -> Sequence[Json]:
    if not schema:
        return []
    return [part for part in schema.get("anyOf", [schema]) if part.get("type") != "null"]


def _resolved(document: Json, schema: Json) -> Json:
    """`schema` without a reference at its top."""
    target: Any = schema
    while "$ref" in target:
        reference, target = target["$ref"], document
        for step in reference.removeprefix("#/").split("/"):
            target = target[step]
    return dict(target)


def _types(schema: Json) -> list[str]:
    kind = schema.get("type", [])
    return [name for name in ([kind] if isinstance(kind, str) else kind) if name != "null"]


def _value(schema: Json) -> str:
    """Type and range in words."""
    if "anyOf" in schema:
        return ", or ".join(dict.fromkeys(_value(part) for part in _alternatives(schema)))
    if "$ref" in schema:
        return str(schema["$ref"].rpartition("/")[2])
    if "const" in schema:
        return json.dumps(schema["const"])
    if "enum" in schema:
        return " or ".join(json.dumps(value) for value in schema["enum"] if value is not None)
    kinds = " or ".join(_types(schema)) or "any"
    if items := _alternatives(schema.get("items") or schema.get("additionalProperties") or {}):
        kinds = f"{kinds} of {' or '.join(dict.fromkeys(_value(item) for item in items))}"
    limits = [_interval(schema), *_sizes(schema), schema.get("pattern", "").strip("^$")]
    return " ".join([kinds, *filter(None, limits)])


def _sizes(schema: Json) -> Iterator[str]:
    for low, high, unit in (("minLength", "maxLength", "characters"), ("minItems", "maxItems", "items")):
        least, most = schema.get(low, 0), schema.get(high)
        if most is not None:
            yield f"({most} {unit})" if least == most else f"({least} to {most} {unit})"
        elif least:
            yield "(not empty)" if least == 1 else f"(at least {least} {unit})"


def _interval(schema: Json) -> str:
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum", schema.get("exclusiveMaximum"))
    if low is None:
        return ""
    if high is None:
        return f"{'≥' if 'minimum' in schema else '>'} {low}"
    opening, closing = "[" if "minimum" in schema else "(", "]" if "maximum" in schema else ")"
    return f"{opening}{low}, {_POWERS.get(high, high)}{closing}"


def _error_rows(document: Json) -> list[Json]:
    names = {status: name for status, name in STATUS.values()}
    responses = document["components"]["responses"]
    return [
        {"status": status, "name": name, "meaning": responses[f"Error{status}"]["description"]}
        for status, name in sorted(names.items())
    ]
