"""How much work a grammar may make: the same numbers where it is tried out and where it is followed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

MAX_GRAMMAR_BYTES = 65_536  # of a client's form, as JSON

# Arguments of llguidance.LLParserLimits. Fuel is the library's measure of work: some 50,000 a millisecond
# while compiling, 14,000 while a mask is computed. A state takes 1 to 2 kB, and every sequence has states of
# its own: ordinary schemas need a few hundred.
PARSER_LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_items_in_row": 2_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 200_000,
    "verbose_errors": False,  # the long form repeats the client's grammar
}


def vocabulary_shape(model_size: int, tokenizer_size: int, eos: Sequence[int]) -> tuple[int, list[int]]:
    """Number of token ids and the ids that end an answer, as a grammar is compiled against them.

    A model without an EOS gets one beyond its ids, which it can never write.
    """
    size = max(model_size, tokenizer_size)
    ends = [token for token in eos if 0 <= token < size]
    return (size, ends) if ends else (size + 1, [size])
