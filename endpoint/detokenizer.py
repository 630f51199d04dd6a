"""Token ids to text, one token at a time, so that every piece can be sent at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence, Set
from typing import NamedTuple, Protocol

_REPLACEMENT = "\ufffd"
_CONTEXT_TOKENS = 6  # of the prompt, so that the first word keeps its leading space
_CHARACTER_TOKENS = 4  # a UTF-8 character has at most 4 bytes, hence as many tokens
_MAX_WINDOW = 16  # tokens that are decoded again before bytes that never make a character are let go


class TokenDecoder(Protocol):
    """The part of a tokenizer that detokenizing needs."""

    @property
    def special_ids(self) -> Set[int]: ...

    def knows(self, token_id: int) -> bool:
        """False for ids the model can produce, but the vocabulary has no text for."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...


class TextDelta(NamedTuple):
    text: str  # safe to send
    stop_hit: str | None = None  # the stop string that has just completed


class IncrementalDetokenizer:
    """The text of one answer, in pieces.

    A piece never holds half a character, nor any part of a stop string that may still complete. Once a stop
    string has completed nothing more may be pushed.
    """

    def __init__(
        self,
        tokenizer: TokenDecoder,
        prompt_ids: Sequence[int],
        skip_special_tokens: bool = True,
        stop: StopStrings | None = None,
        include_stop: bool = False,
        kept: Set[int] = frozenset(),
    ) -> None:
        """With empty `prompt_ids` the text is what decoding the output alone gives.

        `kept`: special tokens that are written out although others are skipped.
        """
        self._text = _TextWindow(tokenizer, prompt_ids, skip_special_tokens, kept)
        self._stop = None if stop is None else _StopFilter(stop, include_stop)

    def push(self, token_id: int, last: bool = False) -> TextDelta:
        """Add a token. `last`: nothing follows, so what was held back comes out."""
        text = self._text.push(token_id)
        return self._release(text + self._text.rest() if last else text, last)

    def finish(self) -> TextDelta:
        """End without a further token."""
        return self._release(self._text.rest(), last=True)

    def _release(self, text: str, last: bool) -> TextDelta:
        return TextDelta(text) if self._stop is None else self._stop.push(text, last)


class _TextWindow:
    """Decodes from the last place where the text was whole, instead of from the beginning.

    `ids[:num_context]` is text already sent; decoding needs it to know whether a leading space belongs there.
    The first `num_sent` characters after it have been sent too.
    """

    def __init__(
        self,
        tokenizer: TokenDecoder,
        prompt_ids: Sequence[int],
        skip_special_tokens: bool,
        kept: Set[int] = frozenset(),
    ) -> None:
        self._decode = tokenizer.decode
        self._knows = tokenizer.knows
        self._skip = skip_special_tokens
        self._skipped: Set[int] = tokenizer.special_ids if skip_special_tokens else frozenset()
        if skip_special_tokens and kept:  # the tokenizer skips all or none, so the others are left out here
            self._skip, self._skipped = False, tokenizer.special_ids - kept
            prompt_ids = [id_ for id_ in prompt_ids[-_MAX_WINDOW:] if id_ not in self._skipped]
        self._ids, self._context_text = self._prompt_context(prompt_ids)
        self._num_context = len(self._ids)
        self._num_sent = 0

    def _prompt_context(self, prompt_ids: Sequence[int]) -> tuple[list[int], str]:
        # a context that begins or ends inside a character would spoil the characters after it
        for size in range(min(_CONTEXT_TOKENS, len(prompt_ids)), 0, -1):
            ids = list(prompt_ids[-size:])
            text = self._decode(ids, self._skip)
            if _REPLACEMENT not in text:
                return ids, text
        return [], ""

    def push(self, token_id: int) -> str:
        if token_id in self._skipped or not self._knows(token_id):
            return ""  # without text now and later; kept, it would only make the window longer
        self._ids.append(token_id)
        fresh = self._fresh()
        if not fresh.endswith(_REPLACEMENT):
            text = fresh[self._num_sent :]
            if fresh:
                self._move(self._num_context)
            return text
        pending = len(self._ids) - self._num_context
        if pending <= _CHARACTER_TOKENS:
            return ""
        # only the last character can still change
        text = fresh[self._num_sent : -1]
        self._num_sent = len(fresh) - 1
        if pending > _MAX_WINDOW:
            self._drop_broken()
        return text

    def rest(self) -> str:
        """Text not sent yet, broken or not."""
        text = self._fresh()[self._num_sent :]
        self._move(len(self._ids))
        return text

    def _fresh(self) -> str:
        return self._decode(self._ids, self._skip)[len(self._context_text) :]

    def _move(self, start: int) -> None:
        """Everything has been sent: the tokens from `start` on become the context."""
        del self._ids[:start]
        self._context_text = self._decode(self._ids, self._skip) if self._ids else ""
        self._num_context = len(self._ids)
        self._num_sent = 0

    def _drop_broken(self) -> None:
        """Shorten a window of bytes that make no character, at a place that splits none."""
        whole = self._decode(self._ids, self._skip)
        for tail in range(1, _CHARACTER_TOKENS):
            end = self._decode(self._ids[-tail:], self._skip)
            if self._decode(self._ids[:-tail], self._skip) + end == whole:
                del self._ids[:-tail]
                self._context_text, self._num_context, self._num_sent = "", 0, len(end) - 1
                return


class StopStrings:
    """An Aho-Corasick automaton over all stop strings of a request. Its states are numbers, the first is 0.

    At their largest they take 9 MB and 30 ms to make, so the choices of a request share one.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self.depth = [0]  # of a state: the length of the longest end of the text that begins a stop string
        self.match: list[str | None] = [None]  # of a state: the longest stop string the text ends with
        for string in stop:
            self._add(string)
        self._fail = [0] * len(self._next)
        self._link()

    def _add(self, string: str) -> None:
        node = 0
        for char in string:
            child = self._next[node].get(char)
            if child is None:
                child = len(self._next)
                self._next[node][char] = child
                self._next.append({})
                self.depth.append(self.depth[node] + 1)
                self.match.append(None)
            node = child
        self.match[node] = string

    def _link(self) -> None:
        queue = deque(self._next[0].values())
        while queue:
            node = queue.popleft()
            for char, child in self._next[node].items():
                self._fail[child] = self.step(self._fail[node], char)
                if self.match[child] is None:
                    self.match[child] = self.match[self._fail[child]]
                queue.append(child)

    def step(self, state: int, char: str) -> int:
        """The state after a further character."""
        while state and char not in self._next[state]:
            state = self._fail[state]
        return self._next[state].get(char, 0)


class _StopFilter:
    """Finds stop strings in a text that comes in pieces, and holds back what may become one.

    The match that completes first wins (of two that complete together, the longer), so the result does not
    depend on where the pieces were cut.
    """

    def __init__(self, strings: StopStrings, include_stop: bool) -> None:
        self._strings = strings
        self._include = include_stop
        self._held = ""
        self._state = 0

    def push(self, text: str, last: bool) -> TextDelta:
        known = len(self._held)
        held = self._held + text
        for position, char in enumerate(text, known + 1):
            self._state = self._strings.step(self._state, char)
            match = self._strings.match[self._state]
            if match is not None:
                return TextDelta(held[: position if self._include else position - len(match)], match)
        keep = 0 if last else self._strings.depth[self._state]
        self._held = held[len(held) - keep :]
        return TextDelta(held[: len(held) - keep])
