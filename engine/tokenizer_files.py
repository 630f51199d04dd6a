"""A model directory's tokenizer, as the endpoint encodes with it and the worker masks with it.

transformers takes two seconds to import and brings torch along: it is asked only for models that have no
tokenizer.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import TemplateProcessing

from engine.errors import EXIT_INIT, StartupError

_SPECIAL_TOKEN_NAMES = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip
_TOKEN_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")


def load_tokenizer(model_dir: Path, trust_remote_code: bool) -> Tokenizer:
    """The tokenizer with everything the directory's files say of it. Raises StartupError."""
    config = read_json(model_dir / "tokenizer_config.json")
    tokenizer = load(model_dir, trust_remote_code)
    complete(tokenizer, config, special_token_names(config, read_json(model_dir / "special_tokens_map.json")))
    return tokenizer


def read_json(file: Path) -> dict[str, Any]:
    """An object, or nothing when there is no such file. Raises StartupError when it is no object."""
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise StartupError(f"{file}: cannot be read as JSON: {error}", EXIT_INIT) from None
    if not isinstance(content, dict):
        raise StartupError(f"{file}: must hold a JSON object", EXIT_INIT)
    return content


def _content(entry: Any) -> str | None:
    """A token of tokenizer_config.json: its text, or an object that has it."""
    if isinstance(entry, Mapping):
        entry = entry.get("content")
    return entry if isinstance(entry, str) else None


def special_token_names(config: Mapping[str, Any], token_map: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token, ... -> text, for those the model has."""
    found = {name: _content(config.get(name, token_map.get(name))) for name in _SPECIAL_TOKEN_NAMES}
    return {name: content for name, content in found.items() if content}


def load(model_dir: Path, trust_remote_code: bool) -> Tokenizer:
    file = model_dir / "tokenizer.json"
    if file.is_file():
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise StartupError(f"{file}: is no usable tokenizer: {error}", EXIT_INIT) from None
    else:
        tokenizer = _convert(model_dir, trust_remote_code)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _convert(model_dir: Path, trust_remote_code: bool) -> Tokenizer:
    """A tokenizer in one of the older formats, by way of transformers."""
    try:
        from transformers import AutoTokenizer

        loaded = AutoTokenizer.from_pretrained(
            str(model_dir), local_files_only=True, trust_remote_code=trust_remote_code
        )
        return Tokenizer.from_str(loaded.backend_tokenizer.to_str())
    except (ImportError, OSError, ValueError, AttributeError, KeyError) as error:
        raise StartupError(
            f"{model_dir}: has no tokenizer.json, and its tokenizer cannot be converted to one ({error}); "
            "save the model's tokenizer in the fast format beside the weights",
            EXIT_INIT,
        ) from None


def complete(tokenizer: Tokenizer, config: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """Apply what tokenizer_config.json says beyond tokenizer.json."""
    declared = config.get("added_tokens_decoder")
    if isinstance(declared, Mapping):
        _add_declared(tokenizer, declared)
    tokenizer.add_special_tokens([text for text in names.values() if tokenizer.token_to_id(text) is not None])
    if "add_bos_token" in config or "add_eos_token" in config:
        _set_added_ends(
            tokenizer,
            names.get("bos_token") if config.get("add_bos_token") is True else None,
            names.get("eos_token") if config.get("add_eos_token") is True else None,
        )


def _add_declared(tokenizer: Tokenizer, declared: Mapping[str, Any]) -> None:
    """Add the tokens of `added_tokens_decoder` (id -> token) that tokenizer.json lacks."""
    for token_id, entry in sorted(declared.items(), key=lambda item: item[0].zfill(10)):
        content = _content(entry)
        if not content or tokenizer.token_to_id(content) is not None:
            continue
        tokenizer.add_tokens(
            [AddedToken(content, **{name: entry.get(name) is True for name in _TOKEN_FLAGS})]
        )
        if str(tokenizer.token_to_id(content)) != token_id:
            raise StartupError(
                f"tokenizer_config.json gives the token {content!r} the id {token_id}, which does not follow "
                "the ids of tokenizer.json; take both files from the same release of the model",
                EXIT_INIT,
            )


def _set_added_ends(tokenizer: Tokenizer, bos: str | None, eos: str | None) -> None:
    """Let plain prompts begin with `bos` and end with `eos`."""
    ends = [(token, tokenizer.token_to_id(token)) for token in (bos, eos) if token]
    first, last = (f"{bos}:0 " if bos else ""), (f" {eos}:0" if eos else "")
    tokenizer.post_processor = TemplateProcessing(single=f"{first}$A:0{last}", special_tokens=ends)
