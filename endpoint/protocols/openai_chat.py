"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from endpoint.protocols.base import Body, ChatPrompt, GenerationRequest, ModelInfo, Reply, ReplyContext
from endpoint.protocols.chat_messages import chat_messages
from endpoint.protocols.openai_chat_reply import ChatReply
from endpoint.protocols.openai_fields import check_model, read_openai
from endpoint.validation import COUNT, Fields, Range, function_name, objects, refuse_unsupported, show
from engine.errors import InvalidRequest

_TOP_LOGPROBS = Range(0, 20)


class OpenAIChat:
    name = "openai_chat"
    routes = ("/v1/chat/completions",)

    def claims(self, body: Body) -> bool:
        return True

    def parse(self, body: Body, model: ModelInfo, path: Mapping[str, str]) -> GenerationRequest:
        fields = Fields(body)
        check_model(fields, model)
        prompt = ChatPrompt(
            messages=chat_messages(fields),
            template_kwargs=_template_kwargs(fields),
            add_generation_prompt=fields.flag("add_generation_prompt", True),
        )
        fields.boolean("parallel_tool_calls")
        refuse_unsupported(
            fields,
            {
                "tools": _shows_tools(fields),
                "chat_template": fields.text("chat_template") is not None,
                "continue_final_message": fields.flag("continue_final_message"),
            },
        )
        return read_openai(fields, model, prompt, wanted_logprobs(fields))

    def reply(self, request: GenerationRequest, body: Body, context: ReplyContext) -> Reply:
        return ChatReply(request, body, context, wanted_logprobs(Fields(body)))


def wanted_logprobs(fields: Fields) -> int:
    """-1 when not asked for, else how many of the most likely tokens; `top_logprobs` alone asks too."""
    wanted = fields.boolean("logprobs")
    top = fields.integer("top_logprobs", _TOP_LOGPROBS)
    if wanted is False and top is not None:
        raise fields.error("top_logprobs", "left out when `logprobs` is false")
    return (top or 0) if wanted or top is not None else -1


def _shows_tools(fields: Fields) -> bool:
    """Whether the model is to be told of tools, and its answer to be searched for calls."""
    tools = fields.array("tools") or []
    for index, tool in enumerate(objects(tools, "tools")):
        _check_function(tool, f"tools[{index}]")
    choice = fields.raw("tool_choice")
    if isinstance(choice, Mapping):
        _check_function(choice, "tool_choice")
    elif choice not in (None, "none", "auto", "required"):
        raise fields.error("tool_choice", '"none", "auto", "required" or an object')
    return bool(tools) and choice != "none"


def _check_function(holder: Mapping[str, Any], where: str) -> None:
    if holder.get("type") != "function":
        raise InvalidRequest(f'`{where}.type` is {show(holder.get("type"))}, but must be "function"')
    function = holder.get("function")
    if not isinstance(function, Mapping):
        raise InvalidRequest(f"`{where}.function` is {show(function)}, but must be an object")
    function_name(function.get("name"), f"{where}.function.name")


def _template_kwargs(fields: Fields) -> Mapping[str, Any]:
    kwargs = fields.object("chat_template_kwargs")
    if kwargs is None:
        return {}
    kwargs.boolean("enable_thinking")
    kwargs.integer("thinking_budget", COUNT)
    return kwargs.members()
