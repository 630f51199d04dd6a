"""Text to token ids and back, and chat prompts.

The `tokenizers` library is used directly: importing transformers' AutoTokenizer takes two seconds and
brings torch into a process that needs neither. It is asked only for models that have no tokenizer.json.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import TemplateProcessing

from endpoint.chat_template import ChatTemplate, find_template
from endpoint.protocols.base import ChatPrompt
from endpoint.validation import is_larger
from engine.errors import EXIT_INIT, InvalidRequest, StartupError

_INLINE_CHARACTERS = 2000  # shorter texts are encoded faster than a thread is woken
_SPECIAL_TOKEN_NAMES = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip
_TOKEN_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")


class TokenizerPool:
    """One tokenizer and the threads that encode long texts with it."""

    def __init__(self, model_dir: Path, threads: int, trust_remote_code: bool = False) -> None:
        """Raises StartupError when the model directory has no usable tokenizer."""
        # the pool's threads are the parallelism: rayon's would be started once more in each of them
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        config = _read_json(model_dir / "tokenizer_config.json")
        names = _special_token_names(config, _read_json(model_dir / "special_tokens_map.json"))
        self._tokenizer = _load(model_dir, trust_remote_code)
        _complete(self._tokenizer, config, names)
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="tokenizer")
        self._eos_token = names.get("eos_token")
        self._model_dir = model_dir
        added = self._tokenizer.get_added_tokens_decoder()
        special = {token_id: token for token_id, token in added.items() if token.special and token.content}
        self.special_ids = frozenset(special)
        self._special_text = _SpecialText([token.content for token in special.values()])
        self._special = special
        self.vocab_size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        source = find_template(model_dir, config)
        self._template = None if source is None else ChatTemplate(source, names)

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every id that ends an answer: of generation_config.json, config.json and the tokenizer."""
        ids: list[int] = []
        for file in ("generation_config.json", "config.json"):
            value = _read_json(self._model_dir / file).get("eos_token_id")
            ids += value if isinstance(value, list) else [value] if isinstance(value, int) else []
        token_id = self._tokenizer.token_to_id(self._eos_token) if self._eos_token else None
        return tuple(dict.fromkeys(ids if token_id is None else [*ids, token_id]))

    # -- text -> ids ---------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """A plain prompt, with the special tokens the tokenizer adds by itself."""
        return _encode(self._tokenizer, text, add_special_tokens=True)

    def encode_chat(self, prompt: ChatPrompt) -> list[int]:
        """A conversation. Only the template can put control tokens into it: their text in a message is text.

        Raises InvalidRequest when the template refuses the messages.
        """
        shield = _Shield(self._special_text)
        covered = replace(
            prompt,
            messages=[{**shield.cover(message), "role": message["role"]} for message in prompt.messages],
            template_kwargs=shield.cover(prompt.template_kwargs),
        )
        if not shield.used:
            return _encode(self._tokenizer, self.render_chat(prompt), add_special_tokens=False)
        return self._guarded.encode(self.render_chat(covered), shield)

    def render_chat(self, prompt: ChatPrompt) -> str:
        """The text the template makes of a conversation. Raises InvalidRequest."""
        if self._template is None:
            raise InvalidRequest(
                "this model has no chat template, hence takes no `messages`; use /v1/completions"
            )
        return self._template.render(prompt)

    async def encode_async(self, text: str) -> list[int]:
        if len(text) < _INLINE_CHARACTERS:
            return self.encode(text)
        return await asyncio.get_running_loop().run_in_executor(self._threads, self.encode, text)

    async def encode_chat_async(self, prompt: ChatPrompt) -> list[int]:
        if not is_larger([*prompt.messages, prompt.template_kwargs], _INLINE_CHARACTERS):
            return self.encode_chat(prompt)
        return await asyncio.get_running_loop().run_in_executor(self._threads, self.encode_chat, prompt)

    @cached_property
    def _guarded(self) -> _GuardedTokenizer:
        return _GuardedTokenizer(self._tokenizer, self._special, self._special_text)

    # -- ids -> text ---------------------------------------------------------------------------------

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens)

    def knows(self, token_id: int) -> bool:
        return self._tokenizer.id_to_token(token_id) is not None

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


class _SpecialText:
    """Finds the text of special tokens."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self._pattern = re.compile(_any_of(sorted(set(tokens))) if tokens else r"(?!)")
        self._beginnings = {token[:size] for token in tokens for size in range(1, len(token))}
        self._longest_beginning = max(map(len, self._beginnings), default=0)

    def replace(self, text: str, by: Callable[[str], str]) -> str:
        return self._pattern.sub(lambda match: by(match[0]), text)

    def begun_at_end(self, text: str) -> int:
        """Number of characters at the end of `text` that may be the beginning of a special token."""
        for size in range(min(self._longest_beginning, len(text)), 0, -1):
            if text[-size:] in self._beginnings:
                return size
        return 0


def _any_of(tokens: Sequence[str]) -> str:
    """A pattern for the longest of these texts; `tokens`: distinct, sorted.

    What they begin with alike is written once. With one alternative for each of the 256 reserved tokens of
    some models, text that repeats their common beginning costs 0.3 s per MB, all of it with the GIL held.
    """
    first, last = tokens[0], tokens[-1]
    if first == last:
        return re.escape(first)
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    prefix, rest = first[:same], [token[same:] for token in tokens]
    branches = [_any_of(list(group)) for _, group in groupby(filter(None, rest), key=itemgetter(0))]
    optional = "" if rest[0] else "?"
    return f"{re.escape(prefix)}(?:{'|'.join(branches)}){optional}"


class _Shield:
    """Puts random stand-ins where the client's strings hold the text of a special token.

    What there is of special tokens in the rendered text is then the template's own. The beginning of one at
    the end of a string is covered too: a template may write two of the client's strings side by side.
    """

    def __init__(self, special_text: _SpecialText) -> None:
        self._special_text = special_text
        self._nonce = secrets.token_hex(8)
        self._covered: list[str] = []

    @property
    def used(self) -> bool:
        return bool(self._covered)

    def cover(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._cover_text(value)
        if isinstance(value, Mapping):
            return {self._cover_name(name): self.cover(member) for name, member in value.items()}
        if isinstance(value, list):
            return [self.cover(item) for item in value]
        return value

    def uncover(self, text: str) -> str:
        return re.sub(f"x{self._nonce}x([0-9]+)x", lambda match: self._covered[int(match[1])], text)

    def _cover_name(self, name: str) -> str:
        return self._special_text.replace(name, self._stand_in)

    def _cover_text(self, text: str) -> str:
        text = self._special_text.replace(text, self._stand_in)
        body = text.rstrip()  # templates trim
        begun = self._special_text.begun_at_end(body)
        if not begun:
            return text
        start = len(body) - begun
        return text[:start] + self._stand_in(body[start:]) + text[len(body) :]

    def _stand_in(self, covered: str) -> str:
        # letters and digits only: filters and tojson leave them alone
        self._covered.append(covered)
        return f"x{self._nonce}x{len(self._covered) - 1}x"


class _GuardedTokenizer:
    """A copy of a tokenizer in which the text of special tokens is ordinary text.

    Each special token goes by a random alias instead, which splits the text exactly as the token itself does,
    so that everything else is encoded as always.
    """

    def __init__(
        self, tokenizer: Tokenizer, special: Mapping[int, AddedToken], special_text: _SpecialText
    ) -> None:
        """`special`: id -> token."""
        nonce = secrets.token_hex(8)
        self._special_text = special_text
        self._tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self._tokenizer.encode_special_tokens = True  # means: encode their text like any other
        self._alias = {token.content: f"<{nonce}-{token_id}>" for token_id, token in special.items()}
        self._tokenizer.add_tokens(
            [
                AddedToken(
                    self._alias[token.content],
                    lstrip=token.lstrip,
                    rstrip=token.rstrip,
                    normalized=False,
                    special=False,
                )
                for token in special.values()
            ]
        )
        self._original = {
            self._tokenizer.token_to_id(self._alias[token.content]): token_id
            for token_id, token in special.items()
        }

    def encode(self, rendered: str, shield: _Shield) -> list[int]:
        """`rendered`: the text in which `shield` still covers the client's strings."""
        aliased = self._special_text.replace(rendered, self._alias.__getitem__)
        ids = _encode(self._tokenizer, shield.uncover(aliased), add_special_tokens=False)
        return [self._original.get(token_id, token_id) for token_id in ids]


def _encode(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
    # encode holds the GIL, encode_batch does not
    return tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids


def _read_json(file: Path) -> dict[str, Any]:
    """An object, or nothing when there is no such file. Raises StartupError when it is no object."""
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise StartupError(f"{file}: cannot be read as JSON: {error}", EXIT_INIT) from None
    if not isinstance(content, dict):
        raise StartupError(f"{file}: must hold a JSON object", EXIT_INIT)
    return content


def _content(entry: Any) -> str | None:
    """A token of tokenizer_config.json: its text, or an object that has it."""
    if isinstance(entry, Mapping):
        entry = entry.get("content")
    return entry if isinstance(entry, str) else None


def _special_token_names(config: Mapping[str, Any], token_map: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token, ... -> text, for those the model has."""
    found = {name: _content(config.get(name, token_map.get(name))) for name in _SPECIAL_TOKEN_NAMES}
    return {name: content for name, content in found.items() if content}


def _load(model_dir: Path, trust_remote_code: bool) -> Tokenizer:
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


def _complete(tokenizer: Tokenizer, config: Mapping[str, Any], names: Mapping[str, str]) -> None:
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
