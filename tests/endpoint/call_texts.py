"""Texts as models of each family write them, and a way to read a parser's answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from endpoint.tools.base import CallParser, Delta, Kind
from endpoint.tools.registry import FORMATS


@dataclass
class Read:
    """What all deltas of a text say together."""

    content: str = ""
    calls: list[list[Any]] = field(default_factory=list)  # name, arguments, whether it is complete
    source: str = ""

    def add(self, deltas: Sequence[Delta]) -> None:
        for delta in deltas:
            self.source += delta.source
            match delta.kind:
                case Kind.TEXT:
                    self.content += delta.text
                case Kind.CALL:
                    self.calls.append([delta.text, "", None])
                case Kind.ARGUMENTS:
                    assert self.calls[-1][2] is None
                    self.calls[-1][1] += delta.text
                case Kind.END | Kind.BROKEN:
                    assert self.calls[-1][2] is None
                    self.calls[-1][2] = delta.kind is Kind.END


def read(form: str, *pieces: str) -> Read:
    """The pieces, of which the last one ends the text."""
    parser: CallParser = FORMATS[form].make_parser()
    found = Read()
    for index, piece in enumerate(pieces, 1):
        found.add(parser.push(piece, last=index == len(pieces)))
    return found


def deepseek(text: str) -> str:
    """`<calls begin>` as DeepSeek's tokens spell it."""
    for words in ("calls begin", "calls end", "call begin", "call end", "sep"):
        text = text.replace(f"<{words}>", f"<\uff5ctool\u2581{words.replace(' ', chr(0x2581))}\uff5c>")
    return text


WEATHER = (
    '{"city": "Paris", "days": [1, -2.5e3, null], "note": "a \\"}<tool_call>\\u00e9\\n", "deep": {"a": {}}}'
)
# format, text, content, calls
WELL_FORMED: list[tuple[str, str, str, list[list[Any]]]] = [
    (
        "hermes",
        f'Let me look.\n<tool_call>\n{{"name": "weather", "arguments": {WEATHER}}}\n</tool_call>',
        "Let me look.\n",
        [["weather", WEATHER, True]],
    ),
    (
        "hermes",
        '<tool_call>{"name":"a","arguments":{}}</tool_call>\n'
        '<tool_call>\n{"arguments": {"x": 1}, "name": "b"}\n</tool_call>',
        "",
        [["a", "{}", True], ["b", '{"x": 1}', True]],
    ),
    ("hermes", '<tool_call>{"name": "\u5929\u6c14", "arguments": {}}', "", [["\u5929\u6c14", "{}", True]]),
    (
        "hermes",
        '<tool_call>{"name": "\\u5929", "arguments": {}}</tool_call> Done.',
        "Done.",
        [["\u5929", "{}", True]],
    ),
    (
        "llama3",
        f'{{"name": "weather", "parameters": {WEATHER}}}',
        "",
        [["weather", WEATHER, True]],
    ),
    (
        "llama3",
        '<|python_tag|>{"type": "function", "name": "a", "parameters": {"x": 1}}; '
        '{"name": "b", "arguments": {}}',
        "",
        [["a", '{"x": 1}', True], ["b", "{}", True]],
    ),
    (
        "deepseek_v3",
        deepseek(
            "Wait.<calls begin><call begin>function<sep>a\n```json\n"
            f"{WEATHER}\n```<call end>\n<call begin>function<sep>b\n```json\n{{}}\n```<call end><calls end>"
        ),
        "Wait.",
        [["a", WEATHER, True], ["b", "{}", True]],
    ),
    (
        "deepseek_v31",
        deepseek(
            f"<calls begin><call begin>a<sep>{WEATHER}<call end><call begin>b<sep>{{}}<call end><calls end>"
        ),
        "",
        [["a", WEATHER, True], ["b", "{}", True]],
    ),
]
# format, text, content, calls
BROKEN: list[tuple[str, str, str, list[list[Any]]]] = [
    ("hermes", "<tool_call>", "<tool_call>", []),
    ("hermes", "a < b <tool_ca", "a < b <tool_ca", []),
    ("hermes", "<tool_call>not JSON</tool_call>", "<tool_call>not JSON</tool_call>", []),
    (
        "hermes",
        '<tool_call>{"name": "a b", "arguments": {}}',
        '<tool_call>{"name": "a b", "arguments": {}}',
        [],
    ),
    (
        "hermes",
        '<tool_call>{"name": "a", "arguments": "{}"}',
        '<tool_call>{"name": "a", "arguments": "{}"}',
        [],
    ),
    ("hermes", '<tool_call>{"name": "a"}</tool_call>', '<tool_call>{"name": "a"}</tool_call>', []),
    ("hermes", '<tool_call>{"name": "a", "name": "b"', '<tool_call>{"name": "a", "name": "b"', []),
    (
        "hermes",
        '<tool_call><tool_call>{"name": "a", "arguments": {}}</tool_call>',
        "<tool_call>",
        [["a", "{}", True]],
    ),
    ("hermes", '<tool_call>{"name": "a", "arguments": {"x": 01}}', "1}}", [["a", '{"x": 0', False]]),
    ("hermes", '<tool_call>{"name": "a", "arguments": {"x": "y', "", [["a", '{"x": "y', False]]),
    ("hermes", '<tool_call>{"name": "a", "arguments": {}, "x": 1}', ', "x": 1}', [["a", "{}", False]]),
    (
        "hermes",
        '<tool_call>{"name": "a", "arguments": {x <tool_call>{"name": "b", "arguments": {}}</tool_call>!',
        "x !",
        [["a", "{", False], ["b", "{}", True]],
    ),
    (
        "llama3",
        'The object {"name": "a", "parameters": {}}',
        'The object {"name": "a", "parameters": {}}',
        [],
    ),
    ("llama3", '{"answer": 42}', '{"answer": 42}', []),
    ("llama3", '{"name": "a", "parameters": {}}; and so on', "; and so on", [["a", "{}", True]]),
    ("llama3", "<|python_tag|>brave.call()", "<|python_tag|>brave.call()", []),
    ("deepseek_v3", deepseek("<calls begin>hm<calls end>"), deepseek("<calls begin>hm<calls end>"), []),
    ("deepseek_v3", deepseek("<call begin>code<sep>a\n"), deepseek("<call begin>code<sep>a\n"), []),
]
