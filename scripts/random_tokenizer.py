"""The tokenizer of random models: every token a whole, distinct, printable word."""

from __future__ import annotations

from typing import Any

END_OF_TEXT, IM_START, IM_END = SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
FIRST_WORD = len(SPECIAL_TOKENS) + 256
SPACE = "Ġ"  # how byte-level vocabularies write a space

SYLLABLES = tuple(consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou")

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + (message['content'] or '') + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def byte_letters() -> list[str]:
    """The printable letter that stands for each byte in byte-level vocabularies.

    Printable bytes of Latin-1 stand for themselves, the others for the letters from 256 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    stand_ins = iter(range(256, 512))
    return [chr(byte if byte in printable else next(stand_ins)) for byte in range(256)]


def word(number: int) -> str:
    """A word of three syllables, another one for each number below 343,000."""
    base = len(SYLLABLES)
    return SYLLABLES[number % base] + SYLLABLES[number // base % base] + SYLLABLES[number // base**2]


def tokenizer_json(vocab_size: int) -> dict[str, Any]:
    """A byte-level tokenizer with exactly `vocab_size` ids: special tokens, bytes, then words with a space.

    It has no merges: a known word is one token, anything else is spelled out in bytes.
    """
    if not FIRST_WORD < vocab_size <= FIRST_WORD + len(SYLLABLES) ** 3:
        raise ValueError(f"no tokenizer of {vocab_size} ids")
    words = (SPACE + word(number) for number in range(vocab_size - FIRST_WORD))
    names = [*SPECIAL_TOKENS, *byte_letters(), *words]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": index, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
                "normalized": False, "special": True,
            }
            for index, name in enumerate(SPECIAL_TOKENS)
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {name: index for index, name in enumerate(names)},
            "merges": [],
        },
    }  # fmt: skip
