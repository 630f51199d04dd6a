"""What a mock model without a tokenizer speaks: UTF-8 bytes as token ids, conversations as plain lines."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def make_byte_tokenizer() -> Tokenizer:
    """256 ids, each the byte of that value."""
    # The library writes bytes as characters: printable ones as themselves, the others as those from 256 on,
    # both in ascending order.
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: ord(character) for character in characters if ord(character) < 256}
    others = [character for character in characters if ord(character) >= 256]
    unprintable = sorted(set(range(256)) - set(vocab.values()))
    vocab.update(zip(others, unprintable, strict=True))
    tokenizer = Tokenizer(models.BPE(vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
