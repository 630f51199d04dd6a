"""POST /v1/tokenizer: how many tokens a text is, and which."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from endpoint import sse
from endpoint.declarations import Flag, Special, request_body
from endpoint.detokenizer import IncrementalDetokenizer, TokenDecoder
from endpoint.protocols.base import Body
from endpoint.protocols.common_fields import NON_EMPTY
from endpoint.validation import Fields, check_token_count, checked_prompt_text


class TextTokenizer(TokenDecoder, Protocol):
    def encode(self, text: str) -> list[int]:
        """A plain prompt, with the special tokens the tokenizer adds by itself."""


class CountRequest(NamedTuple):
    text: str
    do_decode: bool


def _read_text(fields: Fields) -> str:
    text = fields.text("inputs")
    if text is None:
        raise fields.error("inputs", "a non-empty string", "send a text")
    return checked_prompt_text(fields, "inputs", text)


_INPUTS = Special("inputs", "The text to count.", _read_text, NON_EMPTY, required=True)
_DO_DECODE = Flag("do_decode", "Lists the tokens' texts besides their number.", default=True)
COUNT_BODY = request_body(
    "Count the tokens of a text.",
    _INPUTS,
    _DO_DECODE,
    examples={"count": {"inputs": "what is your name?"}},
)


def parse_count(body: Body) -> CountRequest:
    """Raises InvalidRequest."""
    fields = Fields(body)
    return CountRequest(_INPUTS.read(fields), _DO_DECODE.read(fields))


def count_tokens(tokenizer: TextTokenizer, asked: CountRequest) -> bytes:
    """The answer. Takes seconds for the longest texts, so long ones belong in a thread.

    Raises InvalidRequest when there are more tokens than a prompt may have.
    """
    ids = tokenizer.encode(asked.text)
    check_token_count(len(ids))
    texts: list[str] = []
    if asked.do_decode:
        detokenizer = IncrementalDetokenizer(tokenizer, ())
        last = len(ids) - 1
        texts = [detokenizer.push(token_id, last=index == last).text for index, token_id in enumerate(ids)]
    # special tokens, and the first bytes of a character, have no text of their own
    return sse.dumps({"token_number": len(ids), "tokens": [text for text in texts if text]}).encode()
