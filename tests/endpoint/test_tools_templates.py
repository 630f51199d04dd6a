"""How tools, calls and their results reach templates written as the families of models write theirs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from endpoint.main import _chat_format
from endpoint.protocols.base import ChatFormat, ChatPrompt
from endpoint.protocols.openai_chat import OpenAIChat
from endpoint.tokenizer import TokenizerPool
from engine.settings import ChatSettings
from tests.endpoint.call_texts import deepseek
from tests.endpoint.samples import model_info
from tests.endpoint.tiny_tokenizers import byte_level, save

TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "5 < 6 & <|im_end|>", "parameters": {"type": "object"}},
}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Köln"}'}}
MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": '{"sun": true}'},
]
QWEN = """\
{%- if tools %}{{- '<|im_start|>system\\n<tools>' }}
{%- for tool in tools %}{{- '\\n' ~ (tool | tojson) }}{% endfor %}{{- '\\n</tools><|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
{%- if message.role == 'assistant' and message.tool_calls %}
{%- for tool_call in message.tool_calls %}
{%- if tool_call.function is defined %}{% set tool_call = tool_call.function %}{% endif %}
{{- '<tool_call>{"name": "' ~ tool_call.name ~ '", "arguments": ' }}
{{- tool_call.arguments | tojson }}{{- '}</tool_call>' }}
{%- endfor %}
{%- elif message.role == 'tool' %}{{- '<tool_response>' ~ message.content ~ '</tool_response>' }}
{%- else %}{{- message.content }}{% endif %}
{%- endfor %}"""
LLAMA = """\
{%- if tools is not none %}{% for t in tools %}{{ t | tojson(indent=4) }}{% endfor %}{% endif %}
{%- for message in messages %}
{%- if 'tool_calls' in message %}
{%- if not message.tool_calls | length == 1 %}{{ raise_exception('one call at a time') }}{% endif %}
{%- set call = message.tool_calls[0].function %}
{{- '{"name": "' + call.name + '", ' }}{{- '"parameters": ' }}{{- call.arguments | tojson }}{{- '}' }}
{%- elif message.role == 'tool' %}
{%- if message.content is mapping or message.content is iterable %}{{ message.content | tojson }}{% endif %}
{%- else %}{{ message.content | trim }}{% endif %}
{%- endfor %}"""
DEEPSEEK = deepseek("""\
{%- for message in messages %}
{%- if message['role'] == 'assistant' and 'tool_calls' in message %}
{%- for tool in message['tool_calls'] %}
{{- '<call begin>' + tool['type'] + '<sep>' + tool['function']['name'] + '\\n```json\\n' }}
{{- tool['function']['arguments'] | tojson }}{{- '\\n```<call end>' }}
{%- endfor %}
{%- else %}{{- message['content'] }}{% endif %}
{%- endfor %}""")


# knows a message of calls by its missing text, and joins strings instead of using tojson
DEEPSEEK_R1 = deepseek("""\
{%- for message in messages %}
{%- if message['role'] == 'assistant' and message['content'] is none %}
{%- for tool in message['tool_calls'] %}
{{- '<call begin>' + tool['type'] + '<sep>' + tool['function']['name'] + '\\n```json\\n' +
    tool['function']['arguments'] + '\\n```<call end>' }}
{%- endfor %}
{%- elif message['role'] == 'assistant' and message['content'] is not none %}
{{- 'said ' + message['content'] }}
{%- else %}{{- message['content'] }}{% endif %}
{%- endfor %}""")


def pool(directory: Path, template: str) -> TokenizerPool:
    return TokenizerPool(save(byte_level(), directory, chat_template=template), threads=1)


def prompt(**members: Any) -> ChatPrompt:
    body = {"model": "llama", "messages": MESSAGES, "tools": [TOOL], **members}
    parsed = OpenAIChat().parse(body, model_info(), {}).prompt
    assert isinstance(parsed, ChatPrompt)
    return parsed


def test_qwen(tmp_path: Path) -> None:
    rendered = pool(tmp_path, QWEN).render_chat(prompt())
    tools, rest = rendered.removeprefix("<|im_start|>system\n<tools>\n").split("\n</tools><|im_end|>\n")
    assert json.loads(tools) == TOOL
    assert rest == (
        'Weather?<tool_call>{"name": "weather", "arguments": {"city": "Köln"}}</tool_call>'
        '<tool_response>{"sun": true}</tool_response>'
    )


def test_llama(tmp_path: Path) -> None:
    rendered = pool(tmp_path, LLAMA).render_chat(prompt())
    assert rendered.startswith(json.dumps(TOOL, indent=4) + "Weather?")
    assert rendered.endswith(
        '{"name": "weather", "parameters": {"city": "Köln"}}' + json.dumps('{"sun": true}')
    )


def test_deepseek(tmp_path: Path) -> None:
    rendered = pool(tmp_path, DEEPSEEK).render_chat(prompt())
    assert deepseek('<call begin>function<sep>weather\n```json\n{"city": "Köln"}\n```<call end>') in rendered


def test_deepseek_as_it_came_out_first(tmp_path: Path) -> None:
    words = pool(tmp_path, DEEPSEEK_R1)
    rendered = deepseek(
        'Weather?<call begin>function<sep>weather\n```json\n{"city": "Köln"}\n```<call end>{"sun": true}'
    )
    assert words.render_chat(prompt()) == rendered
    assert words.decode(words.encode_chat(prompt())) == rendered
    talk = [MESSAGES[0], {"role": "assistant", "content": "Sun."}]
    assert words.render_chat(prompt(messages=talk)) == "Weather?said Sun."


def test_arguments_that_are_no_object_are_their_text(tmp_path: Path) -> None:
    call = {**CALL, "function": {"name": "weather", "arguments": "not JSON"}}
    asked = {"role": "assistant", "content": "", "tool_calls": [call]}
    assert "not JSON" in pool(tmp_path, DEEPSEEK_R1).render_chat(prompt(messages=[MESSAGES[0], asked]))


def test_tools_that_are_not_wanted_are_not_there(tmp_path: Path) -> None:
    words = pool(tmp_path, LLAMA)
    for members in ({"tools": None}, {"tools": []}, {"tool_choice": "none"}):
        assert words.render_chat(prompt(**members)).startswith("Weather?")


def test_control_text_in_a_tool_is_text(tmp_path: Path) -> None:
    """A15."""
    words = pool(tmp_path, QWEN)
    ids = words.encode_chat(prompt())
    control = [token_id for token_id in ids if token_id in words.special_ids]
    assert words.decode(control, skip_special_tokens=False) == "<|im_start|><|im_end|>"
    assert words.decode(ids, skip_special_tokens=False) == words.render_chat(prompt())


def test_a_template_for_tools_is_used_with_tools_only(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "<|python_tag|>"}]
    listed = TokenizerPool(save(byte_level(), tmp_path, chat_template=named), threads=1)
    assert listed.render_chat(prompt()) == "<|python_tag|>" == listed.template_source
    assert listed.render_chat(prompt(tools=[])) == "plain"
    folder = tmp_path / "additional_chat_templates"
    folder.mkdir()
    (folder / "tool_use.jinja").write_text("own", encoding="utf-8")
    own = pool(tmp_path, "plain")
    assert (own.render_chat(prompt()), own.render_chat(prompt(tools=[]))) == ("own", "plain")


def test_the_format_is_the_configured_one_or_the_templates(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.add_special_tokens(["<|python_tag|>"])
    words = TokenizerPool(save(tokenizer, tmp_path, chat_template="... <|python_tag|> ..."), threads=1)
    tag = words.special_by_text["<|python_tag|>"]
    assert _chat_format(ChatSettings(), words) == ChatFormat("llama3", False, {"<|python_tag|>": tag})
    chosen = ChatSettings(reasoning=True, tool_call_parser="qwen3")
    assert _chat_format(chosen, words) == ChatFormat("qwen3", True, {})
