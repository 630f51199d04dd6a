"""Tools and reasoning of a chat request: what is shown to the model, and what it is made to write."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

from endpoint.declarations import Flag, Json, Special
from endpoint.protocols.base import ChatFormat, GenerationRequest
from endpoint.protocols.schema_rules import check_schema, with_closed_objects
from endpoint.reasoning import MARKERS
from endpoint.tools.base import Tool
from endpoint.tools.registry import FORMATS
from endpoint.validation import (
    FUNCTION_NAME_PATTERN,
    MAX_PROMPT_UNITS,
    Fields,
    function_name,
    is_larger,
    objects,
    show,
)
from engine.errors import InvalidRequest
from engine.grammar_limits import MAX_GRAMMAR_BYTES


@dataclass(frozen=True, slots=True)
class ToolUse:
    """What a request wants of its tools."""

    shown: tuple[Mapping[str, Any], ...] = ()  # to the model; none: nothing is looked for in its answer
    forced: bool = False  # the answer must be calls of them
    parallel: bool = True  # several calls in one answer


class _Named(NamedTuple):
    """The tool that must be called."""

    name: str


def _read_tool_list(fields: Fields) -> list[Mapping[str, Any]]:
    value = fields.array("tools")
    if not value:
        return []
    tools = objects(value, "tools")
    for index, tool in enumerate(tools):
        _check_function(tool, f"tools[{index}]")
    if is_larger(tools, MAX_PROMPT_UNITS):
        raise InvalidRequest(f"`tools` are longer than {MAX_PROMPT_UNITS} characters in all; shorten them")
    return tools


def _read_choice(fields: Fields) -> str | _Named | None:
    choice = fields.raw("tool_choice")
    if isinstance(choice, Mapping):
        return _Named(_check_function(choice, "tool_choice"))
    if choice not in (None, *_CHOICES):
        raise fields.error("tool_choice", '"none", "auto", "required" or an object')
    return cast(str | None, choice)


_CHOICES = ("none", "auto", "required")
_NAME_JSON: Json = {"type": "string", "pattern": f"^{FUNCTION_NAME_PATTERN}$"}


def _function_schema(**members: Json) -> Json:
    function: Json = {"type": "object", "properties": {"name": _NAME_JSON, **members}, "required": ["name"]}
    return {
        "type": "object",
        "properties": {"type": {"const": "function"}, "function": function},
        "required": ["type", "function"],
    }


TOOLS = Special(
    "tools",
    "Functions the model may call.",
    _read_tool_list,
    {
        "type": "array",
        "items": _function_schema(
            description={"description": "What it does, for the model."},
            parameters={"type": ["object", "null"], "description": "JSON Schema of its arguments."},
        ),
    },
)
TOOL_CHOICE = Special(
    "tool_choice",
    "Whether functions are called: never, as the model likes, at least one, or the one that is named.",
    _read_choice,
    {"anyOf": [{"enum": list(_CHOICES)}, _function_schema()]},
    default="auto",
)
PARALLEL_TOOL_CALLS = Flag("parallel_tool_calls", "Allows several calls in one answer.", default=True)


def read_tools(fields: Fields) -> ToolUse:
    """`tools`, `tool_choice` and `parallel_tool_calls`."""
    tools = TOOLS.read(fields)
    choice = TOOL_CHOICE.read(fields)
    parallel = PARALLEL_TOOL_CALLS.read(fields)
    if isinstance(choice, _Named):
        named = tuple(tool for tool in tools if tool["function"]["name"] == choice.name)[:1]
        return ToolUse(named, forced=bool(named), parallel=False)
    if choice == "none":
        return ToolUse()
    return ToolUse(tuple(tools), forced=choice == "required" and bool(tools), parallel=parallel)


def _check_function(holder: Mapping[str, Any], where: str) -> str:
    """The function's name."""
    if holder.get("type") != "function":
        raise InvalidRequest(f'`{where}.type` is {show(holder.get("type"))}, but must be "function"')
    function = holder.get("function")
    if not isinstance(function, Mapping):
        raise InvalidRequest(f"`{where}.function` is {show(function)}, but must be an object")
    name = function_name(function.get("name"), f"{where}.function.name")
    parameters = function.get("parameters")
    if not isinstance(parameters, Mapping | None):
        raise InvalidRequest(
            f"`{where}.function.parameters` is {show(parameters)}, but must be a JSON Schema object; "
            "correct it or leave it out"
        )
    return name


def with_reasoning(request: GenerationRequest, template_kwargs: Mapping[str, Any]) -> GenerationRequest:
    """The request whose reasoning is told apart from its answer, and bounded where it asks for that."""
    budget = template_kwargs.get("thinking_budget") or 0
    if template_kwargs.get("enable_thinking") is not True or request.sampling.beam_search:
        budget = 0
    return replace(
        request,
        reasoning=True,
        markers=(*request.markers, *MARKERS),
        sampling=replace(request.sampling, thinking_budget=budget),
    )


def with_tools(
    request: GenerationRequest, use: ToolUse, fields: Fields, chat: ChatFormat
) -> GenerationRequest:
    """The request whose answer is searched for calls, and made to be one where `use` says so."""
    if not use.shown:
        return request
    form = FORMATS[chat.tools]
    request = replace(request, markers=(*request.markers, *form.markers))
    if not use.forced:
        return request
    if request.sampling.beam_search:
        raise fields.error("tool_choice", '"none" or "auto" with `use_beam_search`')
    if request.sampling.grammar:
        raise fields.error("tool_choice", '"none" or "auto" where the format of the answer is given too')
    tools = [_tool(tool["function"], f"tools[{index}].function") for index, tool in enumerate(use.shown)]
    text = form.grammar(tools, use.parallel, chat.special_ids)
    grammar = json.dumps({"grammars": [{"lark_grammar": text}]})
    if len(grammar) > MAX_GRAMMAR_BYTES:
        raise InvalidRequest(
            f"`tools` make a grammar of {len(grammar)} bytes, but to force a call it must have at most "
            f"{MAX_GRAMMAR_BYTES}; send fewer tools, or name one in `tool_choice`"
        )
    return replace(request, sampling=replace(request.sampling, grammar=grammar), grammar_field="tools")


def _tool(function: Mapping[str, Any], where: str) -> Tool:
    parameters = Fields(function.get("parameters") or {}, f"{where}.parameters.")
    kinds = parameters.raw("type")
    if kinds not in (None, "object") and not (isinstance(kinds, list) and "object" in kinds):
        raise parameters.error("type", '"object" for a call to be forced')
    check_schema(parameters)
    closed = with_closed_objects(parameters.body)
    return Tool(function["name"], {**closed, "type": "object", "x-guidance": _SPACING})


# As models write it by themselves, and no gap is longer.
_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
