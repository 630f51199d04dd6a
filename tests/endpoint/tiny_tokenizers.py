"""Tokenizers with a few hundred tokens, trained on the spot, in the two families that models use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CORPUS = [
    "hello world, this is a tiny text to learn from",
    "the cat sat on the mat",
    "你好世界",
    "hello hello",
] * 3
SPECIALS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}
{%- if enable_thinking is defined and not enable_thinking %}{{- '<think></think>' }}{% endif %}"""


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=alphabet, special_tokens=SPECIALS, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def sentencepiece() -> Tokenizer:
    """As Llama 2: a space becomes U+2581, one is put in front, unknown characters become bytes."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    words = ["▁", "▁hello", "▁world", "▁the", "▁cat", "lo", ",", *"abcdefghijklmnopqrstuvwxyz", "你", "好"]
    vocab = {token: index for index, token in enumerate([*SPECIALS, *byte_tokens, *words])}
    merges = _merges(vocab)
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIALS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
    )
    return tokenizer


def _merges(vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Merges that build every word of the vocabulary from left to right, adding the steps in between."""
    merges: dict[tuple[str, str], None] = {}
    for word in [token for token in vocab if len(token) > 1 and not token.startswith("<")]:
        for size in range(2, len(word) + 1):
            vocab.setdefault(word[:size], len(vocab))
            merges[(word[: size - 1], word[size - 1])] = None
    return list(merges)


def save(tokenizer: Tokenizer, directory: Path, **config: Any) -> Path:
    """A model directory with this tokenizer."""
    tokenizer.save(str(directory / "tokenizer.json"))
    defaults = {"eos_token": "</s>", "bos_token": "<s>", "chat_template": CHAT_TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(defaults | config), encoding="utf-8")
    return directory
