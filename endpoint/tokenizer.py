"""Text to token ids and back, and chat prompts.

The `tokenizers` library is used directly: importing transformers' AutoTokenizer takes two seconds and
brings torch into a process that needs neither. It is asked only for models that have no tokenizer.json.
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property, partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from tokenizers import AddedToken, Tokenizer

from endpoint.byte_tokenizer import PLAIN_TEMPLATE, make_byte_tokenizer
from endpoint.chat_template import (
    ChatTemplate,
    OpenEnd,
    find_template,
    find_tool_template,
    template_variables,
)
from endpoint.client_template import ClientTemplates
from endpoint.grammars import Vocabulary
from endpoint.protocols.base import ChatPrompt
from endpoint.validation import is_larger
from engine.errors import EXIT_INIT, InvalidRequest, StartupError
from engine.grammar_limits import vocabulary_shape
from engine.tokenizer_files import complete, load, read_json, special_token_names

P = ParamSpec("P")
T = TypeVar("T")

_MAX_KWARGS_UNITS = 65_536
_INLINE_CHARACTERS = 2000  # shorter texts are encoded faster than a thread is woken


class TokenizerPool:
    """One tokenizer and the threads that encode long texts with it."""

    def __init__(
        self,
        model_dir: Path,
        threads: int,
        trust_remote_code: bool = False,
        *,
        mock: bool = False,
        chat_template: Path | None = None,
    ) -> None:
        """Raises StartupError when the model directory has no usable tokenizer; a mock then speaks bytes.

        `chat_template`: a file that replaces the model's own template.
        """
        # the pool's threads are the parallelism: rayon's would be started once more in each of them
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        speaks_bytes = mock and not (model_dir / "tokenizer.json").exists()
        # it would describe a tokenizer that is not here
        config = {} if speaks_bytes else read_json(model_dir / "tokenizer_config.json")
        names = special_token_names(config, read_json(model_dir / "special_tokens_map.json"))
        self._tokenizer = make_byte_tokenizer() if speaks_bytes else load(model_dir, trust_remote_code)
        complete(self._tokenizer, config, names)
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="tokenizer")
        self.num_queued = 0  # texts given to the threads and not encoded yet
        self._eos_token = names.get("eos_token")
        self._model_dir = model_dir
        added = self._tokenizer.get_added_tokens_decoder()
        special = {token_id: token for token_id, token in added.items() if token.special and token.content}
        self.special_ids = frozenset(special)
        self._special_text = _SpecialText([token.content for token in special.values()])
        self._special = special
        self.special_by_text = {token.content: token_id for token_id, token in special.items()}
        self.vocab_size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        source, tool_source = find_template(model_dir, config), find_tool_template(model_dir, config)
        if chat_template is not None:
            source, tool_source = _read_text(chat_template), None
        if source is None and speaks_bytes:
            source = PLAIN_TEMPLATE
        self.template_source = tool_source or source or ""  # the one that tells how calls are written
        self._template = None if source is None else ChatTemplate(source, names)
        self._tool_template = self._template if tool_source is None else ChatTemplate(tool_source, names)
        self._special_names = names

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every id that ends an answer: of generation_config.json, config.json and the tokenizer."""
        ids: list[int] = []
        for file in ("generation_config.json", "config.json"):
            value = read_json(self._model_dir / file).get("eos_token_id")
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
        shield, covered, end = self._covered(prompt)
        rendered = self.render_chat(covered)
        return self._encode_rendered(rendered if end is None else end.cut(rendered), shield)

    def _covered(self, prompt: ChatPrompt) -> tuple[_Shield, ChatPrompt, OpenEnd | None]:
        """The prompt as a template may see it, what covers it, and what finds the place to go on from."""
        end = None
        if prompt.continue_final:
            end = OpenEnd()
            prompt = end.mark(prompt)
        shield = _Shield(self._special_text)
        covered = replace(
            prompt,
            messages=[{**shield.cover(message), "role": message["role"]} for message in prompt.messages],
            template_kwargs=shield.cover(prompt.template_kwargs),
            tools=shield.cover(list(prompt.tools)),
        )
        return shield, covered if shield.used else prompt, end

    def _encode_rendered(self, rendered: str, shield: _Shield) -> list[int]:
        if not shield.used:
            return _encode(self._tokenizer, rendered, add_special_tokens=False)
        return self._guarded.encode(rendered, shield)

    async def _encode_by_client_template(self, prompt: ChatPrompt, template: str) -> list[int]:
        # 0.3 s for the longest messages when they are made of special tokens
        shield, covered, end = await self._on_thread(self._covered, prompt)
        variables = template_variables(covered, self._special_names)
        rendered = await self._client_templates.render(template, variables)
        if end is not None:
            rendered = end.cut(rendered)
        return await self._on_thread(self._encode_rendered, rendered, shield)

    def render_chat(self, prompt: ChatPrompt) -> str:
        """The text the template makes of a conversation. Raises InvalidRequest."""
        template = self._tool_template if prompt.tools else self._template
        if template is None:
            raise InvalidRequest(
                "this model has no chat template, hence takes no `messages`; use /v1/completions"
            )
        return template.render(prompt)

    async def encode_async(self, text: str) -> list[int]:
        if len(text) < _INLINE_CHARACTERS:
            return self.encode(text)
        return await self._on_thread(self.encode, text)

    async def encode_chat_async(self, prompt: ChatPrompt) -> list[int]:
        if is_larger(prompt.template_kwargs, _MAX_KWARGS_UNITS):
            raise InvalidRequest(
                f"`chat_template_kwargs` are longer than {_MAX_KWARGS_UNITS} characters in all; shorten them"
            )
        if prompt.template is not None:
            return await self._encode_by_client_template(prompt, prompt.template)
        if not is_larger([*prompt.messages, *prompt.tools, prompt.template_kwargs], _INLINE_CHARACTERS):
            return self.encode_chat(prompt)
        return await self._on_thread(self.encode_chat, prompt)

    async def _on_thread(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        self.num_queued += 1
        try:
            call = partial(work, *args, **kwargs)
            return await asyncio.get_running_loop().run_in_executor(self._threads, call)
        finally:
            self.num_queued -= 1

    def check_fits(self, model_size: int) -> None:
        """Raise StartupError when plain text could become an id that the model has no row for.

        Added tokens beyond are in use (padding of fine-tuned models): whoever sends one is refused.
        """
        largest = max(self._tokenizer.get_vocab(with_added_tokens=False).values(), default=0)
        if largest >= model_size:
            raise StartupError(
                f"{self._model_dir}: tokenizer.json has ids up to {largest}, but config.json a vocab_size of "
                f"{model_size}; take both files from the same release of the model",
                EXIT_INIT,
            )

    def vocabulary(self, model_size: int) -> Vocabulary:
        """What grammars are compiled against; `model_size`: token ids of the model."""
        size, eos = vocabulary_shape(model_size, self.vocab_size, self.eos_token_ids)
        return Vocabulary(self._tokenizer.to_str(), size, eos)

    @cached_property
    def _client_templates(self) -> ClientTemplates:
        return ClientTemplates(self._model_dir)

    @cached_property
    def _guarded(self) -> _GuardedTokenizer:
        return _GuardedTokenizer(self._tokenizer, self._special, self._special_text)

    def encode_bare(self, text: str) -> list[int]:
        """Text alone, without the special tokens the tokenizer adds by itself."""
        return _encode(self._tokenizer, text, add_special_tokens=False)

    def ids_of_special(self, texts: Sequence[str]) -> frozenset[int]:
        """The ids of those texts that are special tokens."""
        return frozenset(self.special_by_text[text] for text in texts if text in self.special_by_text)

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


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise StartupError(f"{file}: cannot be read as UTF-8 text: {error}", EXIT_INIT) from None
