"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from endpoint.protocols.base import (
    Body,
    ChatPrompt,
    Completion,
    GenerationRequest,
    ModelInfo,
    Reply,
    ReplyContext,
    TokenStep,
)
from endpoint.protocols.chat_messages import chat_messages
from endpoint.protocols.openai_common import FINISH, ChunkParts, OpenAIReply, check_model, parse_common
from endpoint.validation import COUNT, Fields, Range, function_name, objects, show
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
        unsupported = {
            **_logprobs(fields),
            "tools": _tools(fields),
            "chat_template": fields.text("chat_template") is not None,
            "continue_final_message": fields.flag("continue_final_message"),
        }
        return parse_common(fields, model, prompt, unsupported)

    def reply(self, request: GenerationRequest, body: Body, context: ReplyContext) -> Reply:
        return ChatReply(body, context)


class ChatReply(OpenAIReply):
    chunk_object = "chat.completion.chunk"
    result_object = "chat.completion"

    def _chunk_parts(self) -> ChunkParts:
        # the role is in every delta, and there is no frame with the role alone: the first frame is
        # what clients take for the first token
        return ChunkParts('{"index":0,"delta":{"role":"assistant","content":', '},"logprobs":null,')

    def _finish_members(self, step: TokenStep, text: str) -> dict[str, Any]:
        choice = {
            "index": 0,
            "delta": {"role": "assistant", "content": text},
            "logprobs": None,
            "finish_reason": FINISH[step.finish] if step.finish else None,
        }
        members: dict[str, Any] = {"choices": [choice]}
        if self._context.full_text_frames:
            members["full_text"] = step.full_text
        return members

    def _choice(self, completion: Completion) -> dict[str, Any]:
        return {
            "index": 0,
            "message": {"role": "assistant", "content": completion.text, "tool_calls": []},
            "logprobs": None,
            "finish_reason": FINISH[completion.finish],
        }

    def _timings(self, completion: Completion) -> dict[str, Any]:
        rounded = [round(ms, 2) for ms in completion.latencies_ms]
        return {"prefill_time": rounded[0] if rounded else None, "decode_time_arr": rounded[1:]}


def _logprobs(fields: Fields) -> dict[str, bool]:
    wanted = fields.boolean("logprobs")
    top = fields.integer("top_logprobs", _TOP_LOGPROBS)
    if wanted is False and top is not None:
        raise fields.error("top_logprobs", "left out when `logprobs` is false")
    return {"logprobs": wanted is True, "top_logprobs": top is not None}  # alone it switches logprobs on


def _tools(fields: Fields) -> bool:
    tools = fields.array("tools") or []
    for index, tool in enumerate(objects(tools, "tools")):
        _check_function(tool, f"tools[{index}]")
    choice = fields.raw("tool_choice")
    if isinstance(choice, Mapping):
        _check_function(choice, "tool_choice")
    elif choice not in (None, "none", "auto", "required"):
        raise fields.error("tool_choice", '"none", "auto", "required" or an object')
    return bool(tools)


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
