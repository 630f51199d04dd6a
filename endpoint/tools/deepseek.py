"""The formats of DeepSeek.

V3 and R1: `<calls><call>function<sep>NAME` with the arguments in a fenced block after it, then `<end>` of the
call and of all calls. V3.1: `<call>NAME<sep>{...}<end>`, told apart by the bracket after the separator.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence

from endpoint.tools.base import CallFormat, Tool, choice_of_calls, literal, marker
from endpoint.tools.json_call import after_space
from endpoint.tools.json_scan import SPACE
from endpoint.tools.machine import Found, Head, Syntax, SyntaxParser
from endpoint.validation import is_function_name


def _token(words: str) -> str:
    """A special token as DeepSeek writes them: a full-width bar at both ends, a low block for a space."""
    return "<\uff5c" + words.replace(" ", "\u2581") + "\uff5c>"


CALLS, _CALLS_END = _token("tool calls begin"), _token("tool calls end")
_CALL, _CALL_END = _token("tool call begin"), _token("tool call end")
_SEPARATOR = _token("tool sep")
_FENCE = "```"
_MAX_NAME = 64


def _head(opener: str) -> Head:
    char = yield from after_space()
    if opener == CALLS:
        if not (yield from _literal(_CALL, char)):
            return None
        char = yield from after_space()
    kind, char = yield from _word(char)
    if not (yield from _literal(_SEPARATOR, char)):
        return None
    char = yield from after_space()
    if char == "{":
        return Found(kind, None) if is_function_name(kind) else None
    if kind != "function":
        return None
    name, char = yield from _word(char)
    if not is_function_name(name):
        return None
    if char in SPACE:
        char = yield from after_space()
    if not (yield from _literal(f"{_FENCE}json", char)):
        return None
    return Found(name, None) if (yield from after_space()) == "{" else None


def _literal(text: str, char: str) -> Generator[None, str, bool]:
    """Whether `char`, already read, and what follows spell `text`."""
    for index, wanted in enumerate(text):
        if index:
            char = yield
        if char != wanted:
            return False
    return True


def _word(char: str) -> Generator[None, str, tuple[str, str]]:
    """A word that begins with `char`, already read, and the character after it."""
    read: list[str] = []
    while len(read) <= _MAX_NAME and (char.isalnum() or char in "_-"):
        read.append(char)
        char = yield
    return "".join(read), char


_SYNTAX = Syntax(
    at_start=(CALLS, _CALL),
    in_text=(CALLS, _CALL),
    after_call=(CALLS, _CALL),
    closers=(_FENCE, _CALL_END, _CALLS_END),
    head=_head,
    tail=None,
)


def _grammar(v31: bool, tools: Sequence[Tool], several: bool, special_ids: Mapping[str, int]) -> str:
    separator = marker(_SEPARATOR, special_ids)

    def before(tool: Tool) -> str:
        if v31:
            return f"{literal(tool.name)} {separator}"
        head = literal(f"{tool.name}\n{_FENCE}json\n")
        return f'"function" {separator} {head}'

    after = marker(_CALL_END, special_ids)
    begin = marker(_CALL, special_ids)
    between = f"{begin} call" if v31 else f'"\\n" {begin} call'
    return "\n".join(
        [
            f"start: {marker(CALLS, special_ids)} {begin} call "
            + (f"({between})* " if several else "")
            + marker(_CALLS_END, special_ids),
            choice_of_calls(tools, before, after if v31 else f'"\\n{_FENCE}" {after}'),
        ]
    )


def _grammar_v3(tools: Sequence[Tool], several: bool, special_ids: Mapping[str, int]) -> str:
    return _grammar(False, tools, several, special_ids)


def _grammar_v31(tools: Sequence[Tool], several: bool, special_ids: Mapping[str, int]) -> str:
    return _grammar(True, tools, several, special_ids)


_MARKERS = (CALLS, _CALL, _SEPARATOR, _CALL_END, _CALLS_END)
DEEPSEEK_V3 = CallFormat(_MARKERS, lambda: SyntaxParser(_SYNTAX), _grammar_v3)
DEEPSEEK_V31 = CallFormat(_MARKERS, lambda: SyntaxParser(_SYNTAX), _grammar_v31)
