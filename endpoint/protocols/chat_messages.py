"""The rules for a message list, and the form in which messages reach the chat template."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from endpoint.declarations import Json, Special
from endpoint.json_body import MIN_DEPTH_LIMIT, parse_body
from endpoint.protocols.common_fields import NON_EMPTY, TEXT_PARTS
from endpoint.validation import (
    FUNCTION_NAME_PATTERN,
    MAX_PROMPT_UNITS,
    Fields,
    function_name,
    is_larger,
    joined_text,
    objects,
    required_text,
    show,
)
from engine.errors import InvalidRequest

Message = dict[str, Any]


def chat_messages(fields: Fields) -> list[Message]:
    """`messages` with `developer` turned into `system` and content parts joined; other keys are kept."""
    value = fields.array("messages")
    if not value:
        raise fields.error("messages", "a non-empty array of messages", "send at least one message")
    if is_larger(value, MAX_PROMPT_UNITS):  # before anything is done with each of them
        raise InvalidRequest(f"`messages` are longer than {MAX_PROMPT_UNITS} characters in all; shorten them")
    return [_message(item, f"messages[{i}]") for i, item in enumerate(objects(value, "messages"))]


def _message(item: Mapping[str, Any], where: str) -> Message:
    role = item.get("role")
    check = _ROLES.get(role) if isinstance(role, str) else None
    if check is None:
        raise InvalidRequest(f"`{where}.role` is {show(role)}, but must be one of {', '.join(_ROLES)}")
    message = {key: value for key, value in item.items() if value is not None}
    if role == "developer":
        message["role"] = "system"
    check(message, where)
    return message


def _plain(message: Message, where: str) -> None:
    message["content"] = joined_text(message.get("content"), f"{where}.content")


def _tool(message: Message, where: str) -> None:
    _plain(message, where)
    required_text(message, "tool_call_id", where)


def _assistant(message: Message, where: str) -> None:
    calls = message.get("tool_calls", [])
    if not isinstance(calls, list):
        raise InvalidRequest(f"`{where}.tool_calls` is {show(calls)}, but must be an array")
    if not calls:
        message.pop("tool_calls", None)
        _plain(message, where)
        if not message["content"]:
            raise InvalidRequest(f"`{where}.content` is empty; send text, or leave the message out")
        return
    content = message.get("content")
    message["content"] = "" if content is None else joined_text(content, f"{where}.content")
    where = f"{where}.tool_calls"
    message["tool_calls"] = [
        _tool_call(call, f"{where}[{i}]") for i, call in enumerate(objects(calls, where))
    ]


def _tool_call(call: Mapping[str, Any], where: str) -> Message:
    if not isinstance(call.get("id"), str):
        raise InvalidRequest(f"`{where}.id` is {show(call.get('id'))}, but must be a string")
    if call.get("type") != "function":
        raise InvalidRequest(f'`{where}.type` is {show(call.get("type"))}, but must be "function"')
    function = call.get("function")
    if not isinstance(function, Mapping):
        raise InvalidRequest(f"`{where}.function` is {show(function)}, but must be an object")
    function_name(function.get("name"), f"{where}.function.name")
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        raise InvalidRequest(f"`{where}.function.arguments` is {show(arguments)}, but must be JSON text")
    return {**call, "function": {**function, "arguments": _arguments(arguments)}}


def _arguments(text: str) -> dict[str, Any] | str:
    # templates write arguments with tojson: text that is an object must become one, or it is quoted twice
    try:
        return parse_body(text.encode(), MIN_DEPTH_LIMIT)
    except InvalidRequest:
        return text


_ROLES: dict[str, Callable[[Message, str], None]] = {
    "system": _plain,
    "developer": _plain,
    "user": _plain,
    "assistant": _assistant,
    "tool": _tool,
}

_FUNCTION_CALL: Json = {
    "type": "object",
    "properties": {
        "id": {"type": "string"},
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "pattern": f"^{FUNCTION_NAME_PATTERN}$"},
                "arguments": {"type": "string", "description": "JSON text."},
            },
            "required": ["name", "arguments"],
        },
    },
    "required": ["id", "type", "function"],
}
_TEXT: Json = {"anyOf": [{"type": "string"}, TEXT_PARTS]}


def _message_schema(roles: list[str], required: Json, optional: Json | None = None) -> Json:
    properties = {"role": {"enum": roles}, **required, **(optional or {})}
    return {"type": "object", "properties": properties, "required": ["role", *required]}


_MESSAGE: Json = {
    "anyOf": [
        _message_schema(["system", "developer", "user"], {"content": _TEXT}),
        _message_schema(["tool"], {"content": _TEXT, "tool_call_id": NON_EMPTY}),
        _message_schema(
            ["assistant"],
            {},
            {
                "content": {
                    "anyOf": [*_TEXT["anyOf"], {"type": "null"}],
                    "description": "May be left out beside calls.",
                },
                "tool_calls": {"type": ["array", "null"], "items": _FUNCTION_CALL},
            },
        ),
    ]
}
MESSAGES = Special(
    "messages",
    "The conversation so far; other members of a message are handed to the chat template.",
    chat_messages,
    {"type": "array", "items": _MESSAGE, "minItems": 1},
    required=True,
)
