"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from endpoint import sse
from endpoint.protocols.base import (
    Body,
    ChatPrompt,
    Completion,
    GenerationRequest,
    ModelInfo,
    Reply,
    ReplyContext,
    TokenLogprob,
    TokenStep,
)
from endpoint.protocols.chat_messages import chat_messages
from endpoint.protocols.openai_fields import check_model, read_openai
from endpoint.protocols.openai_reply import FINISH, OpenAIReply
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
        return read_openai(fields, model, prompt, _logprobs(fields))

    def reply(self, request: GenerationRequest, body: Body, context: ReplyContext) -> Reply:
        return ChatReply(request, body, context)


class ChatReply(OpenAIReply):
    chunk_object = "chat.completion.chunk"
    result_object = "chat.completion"

    def __init__(self, request: GenerationRequest, body: Body, context: ReplyContext) -> None:
        super().__init__(request, body, context)
        self._logprobs = _logprobs(Fields(body))

    # The role is in every delta, and there is no frame with the role alone: the first frame is what clients
    # take for the first token.

    def _unfinished_choice(self, step: TokenStep, text: str) -> str:
        return (
            f'{{"index":{step.choice},"delta":{{"role":"assistant","content":{sse.json_text(text)}}},'
            f'"logprobs":{self._step_logprobs_json(step)},"finish_reason":null}}'
        )

    def _last_choice(self, step: TokenStep, text: str) -> dict[str, Any]:
        return {
            "index": step.choice,
            "delta": {"role": "assistant", "content": text},
            "logprobs": self._step_logprobs(step),
            "finish_reason": FINISH[step.finish] if step.finish else None,
        }

    def _last_members(self, step: TokenStep) -> dict[str, Any]:
        return {"full_text": step.full_text} if self._context.full_text_frames else {}

    def _whole_choices(self, completions: Sequence[Completion]) -> list[dict[str, Any]]:
        return [
            {
                "index": index,
                "message": {"role": "assistant", "content": completion.text, "tool_calls": []},
                "logprobs": self._all_logprobs(completion),
                "finish_reason": FINISH[completion.finish],
            }
            for index, completion in enumerate(completions)
        ]

    def _timings(self, completion: Completion) -> dict[str, Any]:
        rounded = [round(ms, 2) for ms in completion.latencies_ms]
        return {"prefill_time": rounded[0] if rounded else None, "decode_time_arr": rounded[1:]}

    def beam_frames(self, completions: Sequence[Completion]) -> Sequence[bytes]:
        self._note_whole(completions)
        return [self._beam_frame(index, completion) for index, completion in enumerate(completions)]

    def _beam_frame(self, index: int, completion: Completion) -> bytes:
        choice = {
            "index": index,
            "delta": {"role": "assistant", "content": completion.text},
            "logprobs": self._all_logprobs(completion),
            "finish_reason": FINISH[completion.finish],
        }
        members = {**self._usage_member([self._counts[index]]), "choices": [choice]}
        if self._context.full_text_frames:
            members["full_text"] = completion.text
        return self._chunk(members)

    def _step_logprobs_json(self, step: TokenStep) -> str:
        return "null" if step.logprob is None else sse.dumps(self._step_logprobs(step))

    def _step_logprobs(self, step: TokenStep) -> dict[str, Any] | None:
        if self._logprobs < 0 or step.logprob is None:
            return None
        return {"content": [self._entry(step.logprob, step.top_logprobs)]}

    def _all_logprobs(self, completion: Completion) -> dict[str, Any] | None:
        if self._logprobs < 0:
            return None
        pairs = zip(completion.logprobs, completion.top_logprobs, strict=True)
        return {"content": [self._entry(token, top) for token, top in pairs]}

    def _entry(self, token: TokenLogprob, top: Sequence[TokenLogprob]) -> dict[str, Any]:
        return {**_logprob(token), "top_logprobs": [_logprob(other) for other in top[: self._logprobs]]}


def _logprob(token: TokenLogprob) -> dict[str, Any]:
    return {"token": token.text, "logprob": token.logprob, "bytes": list(token.text.encode())}


def _logprobs(fields: Fields) -> int:
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
