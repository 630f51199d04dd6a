"""The JSON format of Llama 3: `{"name": ..., "parameters": {...}}`, several separated by `; `.

The object stands at the beginning of the answer, or after `<|python_tag|>`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from endpoint.tools.base import CallFormat, Tool, choice_of_calls, literal
from endpoint.tools.json_call import call_object, closing_brace
from endpoint.tools.machine import Head, Syntax, SyntaxParser

_TAG = "<|python_tag|>"


def _head(opener: str) -> Head:
    return call_object(("parameters", "arguments"), opener)


_SYNTAX = Syntax(
    at_start=(_TAG, "{"),
    in_text=(_TAG,),
    after_call=(";", _TAG, "{"),
    closers=(),
    head=_head,
    tail=closing_brace,
)


def _grammar(tools: Sequence[Tool], several: bool, special_ids: Mapping[str, int]) -> str:
    del special_ids  # the tag is not needed

    def before(tool: Tool) -> str:
        return literal(f'{{"name": {literal(tool.name)}, "parameters": ')

    more = '("; " call)*' if several else ""
    return "\n".join([f"start: call {more}", choice_of_calls(tools, before, '"}"')])


LLAMA3 = CallFormat((_TAG,), lambda: SyntaxParser(_SYNTAX), _grammar)
