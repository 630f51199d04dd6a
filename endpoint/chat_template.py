"""The model's chat template: messages in, prompt text out, in a sandbox.

A template comes with the model, so it is data from elsewhere: it can neither change what it is given nor
reach anything but the values and the three functions below.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from endpoint.protocols.base import ChatPrompt
from endpoint.validation import show
from engine.errors import EXIT_INIT, InvalidRequest, StartupError

_SHOWN_CHARACTERS = 200
_TEMPLATE_FAULTS = (
    jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError
)  # fmt: skip
_OWN_VARIABLES = frozenset({"messages", "tools", "documents", "add_generation_prompt"})


class _GenerationBlock(Extension):
    """`{% generation %}` marks what the model wrote, for training. Rendering takes the body as it is."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it as an instance attribute)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False, **options: Any) -> str:
    # jinja's own filter escapes for HTML; a prompt is no HTML
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)


class ChatTemplate:
    """A compiled template with the model's special tokens as variables."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """`special_tokens`: bos_token, eos_token, ... as the template knows them. Raises StartupError."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
            self._variables = meta.find_undeclared_variables(environment.parse(source))
        except jinja2.TemplateSyntaxError as error:
            raise StartupError(
                f"the model's chat template is broken at line {error.lineno}: {error.message}", EXIT_INIT
            ) from None
        self._special_tokens = dict(special_tokens)
        self._reserved = _OWN_VARIABLES | special_tokens.keys() | environment.globals.keys()

    def render(self, prompt: ChatPrompt) -> str:
        """Raises InvalidRequest when the template refuses the messages or fails on them."""
        for name in prompt.template_kwargs:
            if name in self._reserved:
                raise InvalidRequest(
                    f"`chat_template_kwargs` has the member {show(name)}, which the server sets; leave it out"
                )
        # a name the template does not use cannot have an effect
        extra = {name: value for name, value in prompt.template_kwargs.items() if name in self._variables}
        try:
            return self._template.render(
                {
                    **extra,
                    **self._special_tokens,
                    "messages": list(prompt.messages),
                    "tools": None,
                    "documents": None,
                    "add_generation_prompt": prompt.add_generation_prompt,
                }
            )
        except _TEMPLATE_FAULTS as error:
            raise InvalidRequest(
                f"the model's chat template refuses `messages`: {str(error)[:_SHOWN_CHARACTERS]}; "
                "change the order or the content of the messages"
            ) from None


def find_template(model_dir: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """The template's source: chat_template.jinja, else `chat_template` of tokenizer_config.json."""
    file = model_dir / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    entry = tokenizer_config.get("chat_template")
    if isinstance(entry, list):  # several by name
        named = {item.get("name"): item.get("template") for item in entry if isinstance(item, Mapping)}
        entry = named.get("default")
    return entry if isinstance(entry, str) else None
