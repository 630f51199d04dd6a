"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from endpoint.chat_template import is_file_name
from endpoint.declarations import Boolean, Flag, Integer, Json, Object, Special, ignored, request_body
from endpoint.protocols.base import Body, ChatPrompt, GenerationRequest, ModelInfo, Reply, ReplyContext
from endpoint.protocols.chat_messages import MESSAGES
from endpoint.protocols.chat_tools import (
    PARALLEL_TOOL_CALLS,
    TOOL_CHOICE,
    TOOLS,
    read_tools,
    with_reasoning,
    with_tools,
)
from endpoint.protocols.openai_chat_calls import PartedChatReply
from endpoint.protocols.openai_chat_reply import ChatReply
from endpoint.protocols.openai_fields import COMMON, read_openai
from endpoint.protocols.openai_members import MODEL
from endpoint.validation import COUNT, Fields, Range

_EXAMPLES: dict[str, Json] = {
    "short": {"model": "", "messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 32},
    "stream": {
        "model": "",
        "messages": [
            {"role": "system", "content": "You are brief."},
            {"role": "user", "content": "Why is the sky blue?"},
        ],
        "max_tokens": 32,
        "temperature": 0.7,
        "seed": 7,
        "stream": True,
        "stream_options": {"include_usage": True},
    },
    "json": {
        "model": "",
        "messages": [{"role": "user", "content": "A name and an age, please."}],
        "max_tokens": 64,
        "response_format": {
            "type": "json_schema",
            "json_schema": {
                "name": "person",
                "schema": {
                    "type": "object",
                    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
                    "required": ["name", "age"],
                },
            },
        },
    },
    "tools": {
        "model": "",
        "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
        "max_tokens": 64,
        "tools": [
            {
                "type": "function",
                "function": {
                    "name": "get_weather",
                    "description": "The weather of a city.",
                    "parameters": {
                        "type": "object",
                        "properties": {"city": {"type": "string"}},
                        "required": ["city"],
                    },
                },
            }
        ],
        "tool_choice": "auto",
    },
    "probabilities": {
        "model": "",
        "messages": [{"role": "user", "content": "Yes or no?"}],
        "max_tokens": 4,
        "logprobs": True,
        "top_logprobs": 2,
    },
}
_LOGPROBS = Boolean("logprobs", "Tells the probability of every token.", default=False)
_TOP_LOGPROBS = Integer(
    "top_logprobs", "And of so many of the most likely ones; asks for `logprobs` too.", Range(0, 20)
)
_ENABLE_THINKING = Boolean(
    "enable_thinking", "Whether the model may reason before it answers.", default="the model's own"
)
_THINKING_BUDGET = Integer(
    "thinking_budget", "Most tokens of reasoning; needs `enable_thinking`.", COUNT, default="no limit"
)
_TEMPLATE_KWARGS = Object(
    "chat_template_kwargs",
    "Handed to the chat template, as any other member is.",
    (_ENABLE_THINKING, _THINKING_BUDGET),
)


def _chat_template(fields: Fields) -> str | None:
    value = fields.text(_TEMPLATE)
    if value is None or "{" in value or is_file_name(value):
        return value
    if ".." in value or "/" in value or "\\" in value or value.endswith(".jinja"):
        raise fields.error(
            _TEMPLATE, "a template's text, or the bare name of a .jinja file in the model's directory"
        )
    return value


_TEMPLATE = "chat_template"
_CHAT_TEMPLATE = Special(
    _TEMPLATE,
    "Takes the place of the model's own template: its text, or the name of a .jinja file beside the model.",
    _chat_template,
    {"type": "string", "minLength": 1},
    default="the model's own",
)
_GENERATION_PROMPT = Boolean(
    "add_generation_prompt",
    "Ends the prompt where the answer begins.",
    default="true, but false with `continue_final_message`",
)
_CONTINUE = Flag(
    "continue_final_message", "Goes on with the last message; not together with `add_generation_prompt`."
)


class OpenAIChat:
    name = "openai_chat"
    family = "OpenAI"
    routes = ("/v1/chat/completions",)
    body = request_body(
        "Answer a conversation.",
        MESSAGES,
        COMMON,
        _LOGPROBS,
        _TOP_LOGPROBS,
        TOOLS,
        TOOL_CHOICE,
        PARALLEL_TOOL_CALLS,
        _TEMPLATE_KWARGS,
        _CHAT_TEMPLATE,
        _GENERATION_PROMPT,
        _CONTINUE,
        ignored("reasoning_effort", "echo"),
        examples=_EXAMPLES,
    )

    def claims(self, body: Body) -> bool:
        return True

    def parse(self, body: Body, model: ModelInfo, path: Mapping[str, str]) -> GenerationRequest:
        fields = Fields(body)
        MODEL.read(fields, model)  # a wrong model is wrong whatever else is
        use = read_tools(fields)
        goes_on, begins = _CONTINUE.read(fields), _GENERATION_PROMPT.read(fields)
        if goes_on and begins:
            raise fields.error("add_generation_prompt", "false with `continue_final_message`")
        prompt = ChatPrompt(
            messages=MESSAGES.read(fields),
            template_kwargs=_template_kwargs(fields),
            add_generation_prompt=not goes_on if begins is None else begins,
            continue_final=goes_on,
            template=_CHAT_TEMPLATE.read(fields),
            tools=use.shown,
        )
        request = read_openai(fields, model, prompt, wanted_logprobs(fields))
        if model.chat.reasoning:
            request = with_reasoning(request, prompt.template_kwargs)
        return with_tools(request, use, fields, model.chat)

    def reply(self, request: GenerationRequest, body: Body, context: ReplyContext) -> Reply:
        fields = Fields(body)
        logprobs = wanted_logprobs(fields)
        if not request.markers:
            return ChatReply(request, body, context, logprobs)
        most_calls = None if read_tools(fields).parallel else 1
        return PartedChatReply(request, body, context, logprobs, most_calls)


def wanted_logprobs(fields: Fields) -> int:
    """-1 when not asked for, else how many of the most likely tokens; `top_logprobs` alone asks too."""
    wanted = _LOGPROBS.read(fields)
    top = _TOP_LOGPROBS.read(fields)
    if wanted is False and top is not None:
        raise fields.error("top_logprobs", "left out when `logprobs` is false")
    return (top or 0) if wanted or top is not None else -1


def _template_kwargs(fields: Fields) -> Mapping[str, Any]:
    kwargs = _TEMPLATE_KWARGS.read(fields)
    _ENABLE_THINKING.read(kwargs)
    _THINKING_BUDGET.read(kwargs)
    return kwargs.body
