"""The eleven inference endpoints of api.md section 16, asked alike and read alike."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal

from tests.harness import Answer, Daemon, Json, sse_payloads

NAME = "mindie-tiny"
MODEL = f"/v2/models/{NAME}"
PROMPT = "Once upon a time"
PROMPT_IDS = [549, 806, 259, 732]  # of PROMPT, by the shipped tokenizer
ENDING = "Otto lived happily ever after"  # the shipped model ends its answer within 40 tokens
IDS = {PROMPT: PROMPT_IDS, ENDING: [49, 679, 452, 1197, 1195, 624]}
TOKENS = 12

Family = Literal["chat", "completions", "vllm", "tgi", "triton", "tensors", "native"]


@dataclass(frozen=True)
class Endpoint:
    """One path, and how its requests and answers are written."""

    name: str
    path: str
    family: Family
    prompt_field: str
    streams: Literal["by field", "always", "never"]

    @property
    def is_openai(self) -> bool:
        return self.family in ("chat", "completions")

    @property
    def takes_parameters(self) -> bool:
        """Whether the options stand in a `parameters` object."""
        return self.family in ("tgi", "triton", "tensors", "native")

    def body(
        self, prompt: Any = None, *, stream: bool = False, max_tokens: int = TOKENS, **options: Any
    ) -> Json:
        """A good request; `options` are put where this endpoint has its options."""
        prompt = PROMPT if prompt is None else prompt
        if self.family == "tensors" and isinstance(prompt, str):
            prompt = IDS[prompt]
        if not self.takes_parameters:
            body = {"max_tokens": max_tokens, **options}
        else:
            body = {"parameters": {"max_new_tokens": max_tokens, **options}}
        if self.is_openai:
            body["model"] = NAME
        if self.family == "chat":
            body["messages"] = [{"role": "user", "content": prompt}]
        elif self.family == "tensors":
            body["inputs"] = [
                {"name": "input0", "shape": [len(prompt)], "datatype": "UINT32", "data": prompt}
            ]
            body["outputs"] = [{"name": "output0"}]
        elif self.family == "native" and isinstance(prompt, list) and isinstance(prompt[0], int):
            body["input_id"] = prompt
        else:
            body[self.prompt_field] = prompt
        if self.streams == "by field":
            body["stream"] = stream
        return body

    def ask(self, server: Daemon, prompt: Any = None, *, stream: bool = False, **options: Any) -> Answer:
        return server.post(self.path, self.body(prompt, stream=stream, **options))

    # -- reading ------------------------------------------------------------------------------------

    def read(self, answer: Answer, prompt: str = PROMPT) -> Reading:
        """What an answer says, whole or streamed. `prompt`: what vLLM repeats."""
        assert answer.status == 200, answer.body
        if not answer.headers["content-type"].startswith("text/event-stream"):
            return self._read_whole(answer.json(), prompt)
        if self.family == "vllm":
            assert answer.body.endswith(b"\0")
            records = [json.loads(record) for record in answer.body[:-1].split(b"\0")]
            return Reading("".join(record["text"][0] for record in records), frames=records)
        payloads = sse_payloads(answer.body)
        if self.is_openai:
            assert payloads.pop() == "[DONE]"
        return self._read_frames([json.loads(payload) for payload in payloads])

    def _read_whole(self, body: Any, prompt: str) -> Reading:
        match self.family:
            case "chat" | "completions":
                choice = body["choices"][0]
                text = choice["message"]["content"] if self.family == "chat" else choice["text"]
                return Reading(text, choice["finish_reason"], body["usage"]["completion_tokens"], body)
            case "vllm":
                assert body["text"][0].startswith(prompt)
                return Reading(body["text"][0].removeprefix(prompt).removeprefix(" "), body=body)
            case "tgi" | "native":
                one = body[0] if isinstance(body, list) else body
                details = one.get("details") or {}
                return Reading(
                    one["generated_text"], details.get("finish_reason"), details.get("generated_tokens"), body
                )
            case "triton":
                details = body.get("details") or {}
                return Reading(
                    body["text_output"], details.get("finish_reason"), details.get("generated_tokens"), body
                )
            case "tensors":
                output = body["outputs"][0]
                return Reading("", None, len(output["data"]), body, ids=output["data"])

    def _read_frames(self, frames: list[Json]) -> Reading:
        last = frames[-1]
        match self.family:
            case "chat" | "completions":
                choices = [choice for frame in frames for choice in frame["choices"] if choice["index"] == 0]
                pieces = [c["delta"].get("content", "") if "delta" in c else c["text"] for c in choices]
                return Reading("".join(pieces), choices[-1]["finish_reason"], frames=frames)
            case "triton":
                details = last.get("details") or {}
                text = "".join(frame["text_output"] for frame in frames)
                return Reading(
                    text, details.get("finish_reason"), details.get("generated_tokens"), frames=frames
                )
            case _:
                details = last.get("details") or {}
                ids = [token for frame in frames for token in frame["token"]["id"]]
                finish, count = details.get("finish_reason"), details.get("generated_tokens")
                return Reading(last["generated_text"], finish, count, frames=frames, ids=ids)


@dataclass(frozen=True)
class Reading:
    text: str  # of the first choice
    finish: str | None = None  # where the answer tells it
    num_tokens: int | None = None
    body: Any = None  # of a whole answer
    frames: list[Json] = field(default_factory=list)  # of a stream, [DONE] aside
    ids: list[int] = field(default_factory=list)  # generated, where the answer tells them


ENDPOINTS = {
    endpoint.name: endpoint
    for endpoint in (
        Endpoint("chat", "/v1/chat/completions", "chat", "messages", "by field"),
        Endpoint("completions", "/v1/completions", "completions", "prompt", "by field"),
        Endpoint("vllm", "/generate", "vllm", "prompt", "by field"),
        Endpoint("tgi generate", "/generate", "tgi", "inputs", "never"),
        Endpoint("tgi stream", "/generate_stream", "tgi", "inputs", "always"),
        Endpoint("tgi root", "/", "tgi", "inputs", "by field"),
        Endpoint("triton generate", f"{MODEL}/generate", "triton", "text_input", "never"),
        Endpoint("triton stream", f"{MODEL}/generate_stream", "triton", "text_input", "always"),
        Endpoint("triton infer", f"{MODEL}/infer", "tensors", "inputs", "never"),
        Endpoint("infer", "/infer", "native", "inputs", "by field"),
        Endpoint("infer_token", "/infer_token", "native", "inputs", "by field"),
    )
}
