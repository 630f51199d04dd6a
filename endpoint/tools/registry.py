"""Which format goes by which name, and which one a chat template speaks."""

from __future__ import annotations

from endpoint.tools.base import CallFormat
from endpoint.tools.deepseek import CALLS, DEEPSEEK_V3, DEEPSEEK_V31
from endpoint.tools.hermes import HERMES
from endpoint.tools.llama3 import LLAMA3

# Every name that configurations for MindIE and vLLM have for a format.
FORMATS: dict[str, CallFormat] = {
    "hermes": HERMES,
    "qwen": HERMES,
    "qwen2": HERMES,
    "qwen2_5": HERMES,
    "qwen3": HERMES,
    "llama": LLAMA3,
    "llama3": LLAMA3,
    "llama3_json": LLAMA3,
    "deepseek": DEEPSEEK_V3,
    "deepseek_v2": DEEPSEEK_V3,
    "deepseek_v3": DEEPSEEK_V3,
    "deepseek_r1": DEEPSEEK_V3,
    "deepseek_v31": DEEPSEEK_V31,
    "deepseek_v3_1": DEEPSEEK_V31,
}
DEFAULT = "hermes"

# What a template that renders tools holds: (text, name of the format), the first that is found.
_SIGNS = (
    ("<tool_call>", "hermes"),
    (CALLS, "deepseek_v3"),
    ("<|python_tag|>", "llama3"),
    ("<|start_header_id|>", "llama3"),  # of Llama 3, where some templates do without the tag
)


def detect(template: str) -> str:
    """The format's name for a chat template's source; the default one when it shows none."""
    if CALLS in template and "```json" not in template:
        return "deepseek_v31"
    return next((name for sign, name in _SIGNS if sign in template), DEFAULT)
