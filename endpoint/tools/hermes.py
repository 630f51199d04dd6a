"""The format of Qwen and Hermes: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from endpoint.tools.base import CallFormat, Tool, choice_of_calls, literal, marker
from endpoint.tools.json_call import call_object, closing_brace
from endpoint.tools.machine import Head, Syntax, SyntaxParser

_BEGIN, _END = "<tool_call>", "</tool_call>"


def _head(opener: str) -> Head:
    return call_object(("arguments",), opener)


_SYNTAX = Syntax(
    at_start=(_BEGIN,),
    in_text=(_BEGIN,),
    after_call=(_BEGIN,),
    closers=(_END,),
    head=_head,
    tail=closing_brace,
)


def _grammar(tools: Sequence[Tool], several: bool, special_ids: Mapping[str, int]) -> str:
    def before(tool: Tool) -> str:
        return literal(f'{{"name": {literal(tool.name)}, "arguments": ')

    begin, end = marker(_BEGIN, special_ids), marker(_END, special_ids)
    more = '("\\n" block)*' if several else ""
    return "\n".join(
        [
            f"start: block {more}",
            f'block: {begin} "\\n" call {end}',
            choice_of_calls(tools, before, '"}\\n"'),
        ]
    )


HERMES = CallFormat((_BEGIN, _END), lambda: SyntaxParser(_SYNTAX), _grammar)
