"""The tokenizer of a mock without one: ids are bytes, whatever the text."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from endpoint.byte_tokenizer import make_byte_tokenizer
from endpoint.protocols.base import ChatPrompt
from endpoint.tokenizer import TokenizerPool
from engine.errors import StartupError

BYTES = make_byte_tokenizer()


@given(st.text())
def test_ids_are_bytes_and_come_back_as_text(text: str) -> None:
    ids = BYTES.encode(text).ids
    assert ids == list(text.encode())
    assert BYTES.decode(ids) == text


def test_every_byte_has_its_id() -> None:
    assert BYTES.get_vocab_size() == 256
    assert sorted(BYTES.get_vocab().values()) == list(range(256))


def test_only_a_mock_without_a_tokenizer_speaks_bytes(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"no tokenizer\.json"):
        TokenizerPool(tmp_path, threads=1)
    pool = TokenizerPool(tmp_path, threads=1, mock=True)
    assert (pool.vocab_size, pool.eos_token_ids, pool.special_ids) == (256, (), frozenset())
    prompt = ChatPrompt(messages=[{"role": "user", "content": "Who?"}])
    assert pool.render_chat(prompt) == "user: Who?\nassistant: "
    assert pool.encode_chat(prompt) == list(b"user: Who?\nassistant: ")


def test_a_file_about_a_tokenizer_that_is_not_there_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"900": {"content": "<x>"}}}')
    assert TokenizerPool(tmp_path, threads=1, mock=True).vocab_size == 256
