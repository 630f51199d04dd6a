"""The chat template: messages in, prompt text out.

The model's own template comes with the model, so it is data from elsewhere, but chosen by the operator: it is
rendered here. One that comes with a request is rendered by endpoint.client_template.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta

from endpoint.protocols.base import ChatPrompt
from endpoint.template_child import FAULTS, make_environment, shown
from endpoint.validation import show
from engine.errors import EXIT_INIT, InvalidRequest, StartupError

_OWN_VARIABLES = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
_FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*\.jinja")
_FUNCTIONS = frozenset(make_environment().globals)
_TESTS_FOR_NONE = re.compile(r"""content['"]?\]?\s+is\s+(?:not\s+)?none""", re.IGNORECASE)


class _Arguments(dict[str, Any]):
    """Of a call: an object for templates that write it with tojson, text for those that join strings."""

    def __str__(self) -> str:
        return json.dumps(self, ensure_ascii=False)

    def __add__(self, other: str) -> str:
        return str(self) + other

    def __radd__(self, other: str) -> str:
        return other + str(self)


class ChatTemplate:
    """A compiled template with the model's special tokens as variables."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """`special_tokens`: bos_token, eos_token, ... as the template knows them. Raises StartupError."""
        environment = make_environment()
        try:
            self._template = environment.from_string(source)
            self._used = meta.find_undeclared_variables(environment.parse(source))
        except jinja2.TemplateSyntaxError as error:
            raise StartupError(
                f"the model's chat template is broken at line {error.lineno}: {error.message}", EXIT_INIT
            ) from None
        self._special_tokens = dict(special_tokens)
        self._tests_for_none = _TESTS_FOR_NONE.search(source) is not None

    def render(self, prompt: ChatPrompt) -> str:
        """Raises InvalidRequest when the template refuses the messages or fails on them."""
        variables = template_variables(prompt, self._special_tokens)
        # a name the template does not use cannot have an effect
        unused = prompt.template_kwargs.keys() - self._used
        variables["messages"] = [self._with_calls(message) for message in prompt.messages]
        try:
            return self._template.render({n: value for n, value in variables.items() if n not in unused})
        except FAULTS as error:
            raise InvalidRequest(
                f"the model's chat template refuses `messages`: {shown(error)}; "
                "change the order or the content of the messages"
            ) from None

    def _with_calls(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        """A message as templates of every family read it when it has calls."""
        if not message.get("tool_calls"):
            return message
        calls = []
        for call in message["tool_calls"]:
            arguments = call["function"]["arguments"]
            if isinstance(arguments, dict):
                call = {**call, "function": {**call["function"], "arguments": _Arguments(arguments)}}
            calls.append(call)
        # some know a message of calls by its missing text
        content = None if self._tests_for_none and not message.get("content") else message.get("content")
        return {**message, "tool_calls": calls, "content": content}


def template_variables(prompt: ChatPrompt, special_tokens: Mapping[str, str]) -> dict[str, Any]:
    """What a template knows. Raises InvalidRequest when the request names what is not its own to set."""
    reserved = _OWN_VARIABLES | special_tokens.keys() | _FUNCTIONS
    for name in prompt.template_kwargs:
        if name in reserved:
            raise InvalidRequest(
                f"`chat_template_kwargs` has the member {show(name)}, which the server sets; leave it out"
            )
    return {
        **prompt.template_kwargs,
        **special_tokens,
        "messages": list(prompt.messages),
        "tools": list(prompt.tools) or None,
        "documents": None,
        "add_generation_prompt": prompt.add_generation_prompt,
    }


class OpenEnd:
    """Finds in the rendered text where the content of the last message ends, for an answer to go on there.

    A mark behind the content shows the place, as templates may well write the same words elsewhere. It ends
    in a space, which a template that trims takes away.
    """

    def __init__(self) -> None:
        self._mark = f"x{secrets.token_hex(8)}x "

    def mark(self, prompt: ChatPrompt) -> ChatPrompt:
        """Raises InvalidRequest when the last message has no text."""
        *others, last = prompt.messages
        content = last.get("content")
        if not isinstance(content, str) or not content:
            raise InvalidRequest(
                "`continue_final_message` needs text in the `content` of the last message; send some, or "
                "leave the member out"
            )
        return replace(prompt, messages=[*others, {**last, "content": content + self._mark}])

    def cut(self, rendered: str) -> str:
        """Raises InvalidRequest when the template has left the last message out."""
        place = rendered.rfind(self._mark.rstrip())
        if place < 0:
            raise InvalidRequest(
                "`continue_final_message` cannot be served: the chat template does not write the last "
                "message; leave the member out"
            )
        before = rendered[:place]
        return before if rendered.startswith(self._mark, place) else before.rstrip()


def is_file_name(template: str) -> bool:
    """Whether a request's template is the name of a file, one in the model's own directory at that."""
    return _FILE_NAME.fullmatch(template) is not None and ".." not in template


def find_template(model_dir: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """The template's source: chat_template.jinja, else `chat_template` of tokenizer_config.json."""
    file = model_dir / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    entry = tokenizer_config.get("chat_template")
    if isinstance(entry, list):  # several by name
        entry = _named_template(entry, "default")
    return entry if isinstance(entry, str) else None


def find_tool_template(model_dir: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """The source of a template of its own for conversations with tools, which a few models have."""
    file = model_dir / "additional_chat_templates" / "tool_use.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    entry = tokenizer_config.get("chat_template")
    return _named_template(entry, "tool_use") if isinstance(entry, list) else None


def _named_template(templates: Sequence[Any], name: str) -> str | None:
    found = {item.get("name"): item.get("template") for item in templates if isinstance(item, Mapping)}
    source = found.get(name)
    return source if isinstance(source, str) else None
