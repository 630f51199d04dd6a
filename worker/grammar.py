"""What an answer may go on with: grammars followed token by token, and the end of reasoning before them."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from collections.abc import Sequence as Seq
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from numpy.typing import NDArray

from engine.grammar_limits import PARSER_LIMITS, vocabulary_shape
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from engine.tokenizer_files import load_tokenizer

log = logging.getLogger("llm.grammar")

Bits = NDArray[np.bool_]

_CACHE_BYTES = 64 << 20
_COMPILED_PER_BYTE = 100  # measured on schemas of 20 to 60 kB: at most so many bytes per byte of grammar
_COMPILED_LEAST = 256 << 10


class NoContinuation(Exception):
    """Nothing may follow, or finding out what may takes more than a request's share."""


@dataclass(slots=True)
class Progress:
    """How far one sequence has come in its reasoning and its grammar; kept with the sequence."""

    matcher: LLMatcher | None  # None: no grammar
    answering: bool  # the reasoning is over, or there is none
    seen: int = 0  # output tokens taken in
    ended: bool = False  # an EOS has been taken in


@dataclass(slots=True)
class GrammarBook:
    """The vocabulary, the grammars compiled against it, and the progress of every sequence that has one.

    `make_vocabulary` runs beside everything else: for 150,000 tokens it takes a second.
    """

    make_vocabulary: Callable[[], LLTokenizer]
    vocab_size: int  # of the model; ids beyond the tokenizer's are never legal
    eos: Seq[int]
    cache_bytes: int = _CACHE_BYTES
    _vocabulary: Future[LLTokenizer] = field(init=False)
    _compiled: OrderedDict[str, LLMatcher] = field(init=False, default_factory=OrderedDict)
    _size: int = field(init=False, default=0)
    _ends: Bits = field(init=False)
    _words: NDArray[np.int32] = field(init=False)

    def __post_init__(self) -> None:
        self._vocabulary = ThreadPoolExecutor(1, thread_name_prefix="vocabulary").submit(self.make_vocabulary)
        self._ends = np.zeros(self.vocab_size, np.bool_)
        self._ends[[token for token in self.eos if token < self.vocab_size]] = True
        self._words = np.empty(0, np.int32)

    def legal(self, sequence: Sequence) -> Bits | int | None:
        """What may come next: a mask over the vocabulary (not to be kept), the one forced token, or anything.

        Raises NoContinuation.
        """
        params = sequence.params
        progress = sequence.progress
        if not isinstance(progress, Progress):
            progress = sequence.progress = self._begin(params)
        self._take_in(progress, sequence)
        if not progress.answering:
            over = sequence.num_output - params.thinking_budget
            if params.thinking_budget and over >= 0:
                # by position alone: it is over before these are
                return params.reasoning_end[over]
            # whoever asks for a format wants an answer after the reasoning
            return None if progress.matcher is None else ~self._ends
        if progress.matcher is None:
            return None
        if progress.ended:
            return self._ends
        return self._mask(progress.matcher)

    def _begin(self, params: SamplingParams) -> Progress:
        matcher = self._compile(params.grammar).deep_copy() if params.grammar else None
        return Progress(matcher, answering=not params.reasoning_end)

    def _take_in(self, progress: Progress, sequence: Sequence) -> None:
        output = sequence.output_ids
        end = sequence.params.reasoning_end
        while progress.seen < len(output):
            progress.seen += 1
            token = int(output[progress.seen - 1])
            if not progress.answering:
                newest = output[max(0, progress.seen - len(end)) : progress.seen]
                progress.answering = newest.tolist() == list(end)
            elif token in self.eos:
                progress.ended = True
            elif progress.matcher is not None and not progress.ended:
                progress.matcher.consume_token(token)

    def _mask(self, matcher: LLMatcher) -> Bits:
        words = self._words
        # written in place: a fresh buffer for each mask would be page-faulted in
        matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        if matcher.is_error():
            raise NoContinuation
        bits = np.unpackbits(words.view(np.uint8), bitorder="little", count=self.vocab_size)
        if not bits.any():
            raise NoContinuation
        return bits.view(np.bool_)

    def _compile(self, grammar: str) -> LLMatcher:
        found = self._compiled.get(grammar)
        if found is not None:
            self._compiled.move_to_end(grammar)
            return found
        try:
            vocabulary = self._vocabulary.result()
        except Exception as error:  # of a native library; the endpoint has loaded the same files
            log.exception("the tokenizer cannot be used with grammars")
            raise NoContinuation from error
        if not len(self._words):
            self._words = np.zeros(-(-vocabulary.vocab_size // 32), np.int32)
        matcher = LLMatcher(vocabulary, grammar, log_level=0, limits=LLParserLimits(**PARSER_LIMITS))
        self._compiled[grammar] = matcher
        self._size += _weight(grammar)
        while self._size > self.cache_bytes and len(self._compiled) > 1:
            self._size -= _weight(self._compiled.popitem(last=False)[0])
        return matcher


def _weight(grammar: str) -> int:
    """Bytes a compiled grammar may take, which the library does not tell."""
    return max(_COMPILED_LEAST, len(grammar) * _COMPILED_PER_BYTE)


def read_vocabulary(
    model_dir: Path, trust_remote_code: bool, vocab_size: int, eos: Seq[int]
) -> Callable[[], LLTokenizer]:
    """What makes the vocabulary of a model directory."""

    def make() -> LLTokenizer:
        tokenizer = load_tokenizer(model_dir, trust_remote_code)
        size, ends = vocabulary_shape(vocab_size, tokenizer.get_vocab_size(with_added_tokens=True), eos)
        return LLTokenizer(tokenizer.to_str(), n_vocab=size, eos_token=ends)

    return make
