"""How large the rings are. Apart from layout.py, because the parent needs it and must not load numpy."""

from __future__ import annotations

PROMPT_SLOTS = 64
PROMPT_HEADER_BYTES = 16
TOKEN_SLOTS = 256
TOKEN_SLOT_BYTES = 64 * 1024
STEP_SLOTS = 16
STEP_SLOT_BYTES = 64 * 1024  # a larger step takes several


def prompt_slot_bytes(max_prompt_tokens: int) -> int:
    return PROMPT_HEADER_BYTES + 4 * max_prompt_tokens
