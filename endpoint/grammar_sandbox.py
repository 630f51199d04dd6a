"""Tries grammars out where they can harm nobody. A program of its own, started by endpoint.grammars.

The library's own bounds are not enough: `{"type": "integer", "multipleOf": 9999991}` keeps it busy for
minutes and takes gigabytes, in native code that no thread can be stopped in. So each grammar is compiled in a
child of this process, which the kernel ends at a limit of processor time and of memory. The vocabulary is
built once: the children inherit it.

Frames on stdin and stdout are a length (4 bytes, little-endian) and JSON. First comes the vocabulary, then
`{"id", "grammar"}` each, answered by `{"id", "grammar"}` (as llguidance takes it) or `{"id", "error"}`. The
process ends when stdin does.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import resource
import selectors
import signal
import struct
import sys
import time
from typing import Any, BinaryIO

from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import gbnf_to_lark

TRIAL_S = 2.0  # processor time of one grammar in all, reliability.md section 2
COMPILE_S = 0.5  # of it until the first mask: so long the engine stands still when it meets the grammar
STEP_S = 0.1  # of one token
MEMORY = 1 << 30  # bytes beyond what the vocabulary takes
WALKS = 3  # answers tried
WALK_TOKENS = 48  # of each
MAX_REPEATS = 10_000  # of counted repetitions inside counted repetitions: x{100} in (...){100}

_LENGTH = struct.Struct("<I")
_TOO_MUCH = "it is too complex: trying it out took more than its share of time or memory"
_ROUNDS = 20  # names of names that are followed
_COUNT = r"\{\s*\d*\s*,?\s*\d*\s*\}"
_IN_REGEX = re.compile(rf"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|{_COUNT}|.", re.DOTALL)
_IN_LARK = re.compile(
    r'"(?:\\.|[^"\\\n])*"|//[^\n]*|/(?:\\.|[^/\\\n])+/'
    rf"|[A-Za-z_]\w*(?:\.-?\d+)?(?:\[[^\]\n]*\])?[ \t]*:|[A-Za-z_]\w*|~\s*\d+(?:\s*\.\.\s*\d+)?|{_COUNT}|.",
    re.DOTALL,
)
_VERBOSE = re.compile(r"\(\?[A-Za-z]*x")


class Refused(Exception):
    """Why a grammar is refused, in one line."""


def serve(requests: int, answers: BinaryIO) -> None:
    """`requests`: a file descriptor, because a buffer would hide what the selector waits for."""
    given = _read(requests)
    if given is None:
        return
    vocabulary = _vocabulary(given)
    limits = LLParserLimits(**given["limits"])
    running: dict[int, tuple[int, int, bytearray]] = {}  # pipe -> (request, process, its answer so far)
    with selectors.DefaultSelector() as selector:
        selector.register(requests, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fd == requests:
                    asked = _read(requests)
                    if asked is None:
                        for _, process, _ in running.values():
                            os.kill(process, signal.SIGKILL)
                        return
                    pipe, process = _start(vocabulary, limits, asked["grammar"])
                    running[pipe] = asked["id"], process, bytearray()
                    selector.register(pipe, selectors.EVENT_READ)
                    continue
                number, process, answer = running[key.fd]
                piece = os.read(key.fd, 1 << 16)
                answer += piece
                if not piece:
                    selector.unregister(key.fd)
                    os.close(key.fd)
                    del running[key.fd]
                    _, status = os.waitpid(process, 0)
                    verdict = json.loads(answer) if status == 0 else {"error": _TOO_MUCH}
                    _write(answers, {"id": number, **verdict})


def _vocabulary(given: dict[str, Any]) -> LLTokenizer | None:
    try:
        return LLTokenizer(given["tokenizer"], n_vocab=given["n_vocab"], eos_token=given["eos"])
    except Exception:  # a native library, and a tokenizer of a kind it may not know
        return None


def _start(vocabulary: LLTokenizer | None, limits: LLParserLimits, grammar: str) -> tuple[int, int]:
    """A child that writes its verdict into the pipe: (the pipe's reading end, its process id)."""
    reading, writing = os.pipe()
    process = os.fork()
    if process:
        os.close(writing)
        return reading, process
    try:
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        os.dup2(0, 1)
        os.dup2(0, 2)  # a native panic is no news for the server's log
        _restrict()
        try:
            if vocabulary is None:
                raise Refused("this model's tokenizer is of a kind that goes with no grammar")
            verdict = {"grammar": tried(vocabulary, limits, grammar)}
        except Refused as reason:
            verdict = {"error": str(reason)}
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(json.dumps(verdict).encode())
    except BaseException:
        os._exit(1)
    os._exit(0)


def _restrict() -> None:
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, TRIAL_S)
    with open("/proc/self/statm", encoding="ascii") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    for kind, limit in ((resource.RLIMIT_AS, taken + MEMORY), (resource.RLIMIT_CORE, 0)):
        _, hard = resource.getrlimit(kind)
        if hard == resource.RLIM_INFINITY or limit < hard:
            resource.setrlimit(kind, (limit, limit))
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write("1000")


def tried(vocabulary: LLTokenizer, limits: LLParserLimits, grammar: str) -> str:
    """The grammar in the library's form, after some answers were made by it. Raises Refused."""
    text = _translated(grammar)
    _check_repeats(text)
    start = time.process_time()
    matcher = LLMatcher(vocabulary, text, log_level=0, limits=limits)
    _check(matcher)
    first = _legal(matcher)
    if time.process_time() - start > COMPILE_S:
        raise Refused(_TOO_MUCH)
    for seed in range(WALKS):
        _walk(matcher.deep_copy(), vocabulary, first, random.Random(seed))
    return text


def _walk(matcher: LLMatcher, vocabulary: LLTokenizer, legal: list[int], rng: random.Random) -> None:
    """One random answer, some of whose tokens are the shortest way on, as in a real one."""
    for _ in range(WALK_TOKENS):
        ends = [token for token in legal if token not in vocabulary.eos_tokens]
        if not ends:
            return
        start = time.process_time()
        matcher.consume_token(rng.choice(ends))
        legal = _legal(matcher)
        if time.process_time() - start > STEP_S:
            raise Refused(_TOO_MUCH)


def _legal(matcher: LLMatcher) -> list[int]:
    mask = int.from_bytes(matcher.compute_bitmask(), "little")
    _check(matcher)
    bits = f"{mask:b}"[::-1]
    found, at = [], bits.find("1")
    while at >= 0:
        found.append(at)
        at = bits.find("1", at + 1)
    if not found:
        raise Refused("no text can ever satisfy it")
    return found


def _check(matcher: LLMatcher) -> None:
    if matcher.is_error():
        raise Refused(_reason(matcher.get_error()))


def _reason(error: str) -> str:
    """The library's reason in one short line, without the grammar it quotes."""
    error = error.split("\n<", 1)[0]
    if error.startswith("NoExtension"):
        return "no text can ever satisfy it"
    lines = [line.strip() for line in error.splitlines()]
    kept = [line for line in lines if line and not line.startswith("^") and not re.match(r"\d+ \|", line)]
    cause = next(
        (line for line in kept if line.startswith("error: ")), kept[0] if kept else "it is not valid"
    )
    return cause.removeprefix("error: ")[:160]


def _translated(grammar: str) -> str:
    """GBNF arrives as `{"gbnf": ...}`; everything else is what the library reads."""
    if not grammar.startswith('{"gbnf"'):
        return grammar
    try:
        lark = gbnf_to_lark(json.loads(grammar)["gbnf"])
    except RecursionError:
        raise Refused("it is nested too deeply") from None
    except Exception as error:  # the library raises bare Exception
        raise Refused(f"as GBNF it is not valid: {str(error)[:120]!r}") from None
    return json.dumps({"grammars": [{"lark_grammar": lark}]})


# -- counted repetitions --------------------------------------------------------------------------------


def _check_repeats(grammar: str) -> None:
    """Refuse counted repetitions that multiply: what they cost shows only when an answer gets there."""
    for pattern, is_lark in _patterns(grammar):
        if _VERBOSE.search(pattern):
            raise Refused("the flag x of regular expressions is not served")
        if (_repeats_of_lark(pattern) if is_lark else _repeats_of_regex(pattern)) > MAX_REPEATS:
            raise Refused(
                f"counted repetitions inside of each other must not multiply to more than {MAX_REPEATS}"
            )


def _patterns(grammar: str) -> list[tuple[str, bool]]:
    """Every regular expression, and every Lark text (True)."""
    try:
        rest = [json.loads(grammar)]
    except ValueError:
        return [(grammar, True)]
    found: list[tuple[str, bool]] = []
    while rest:
        value = rest.pop()
        if isinstance(value, list):
            rest += value
        elif isinstance(value, dict):
            rest += value.values()
            properties = value.get("patternProperties")
            found += [(name, False) for name in properties] if isinstance(properties, dict) else []
            for name, is_lark in (("pattern", False), ("lark_grammar", True)):
                if isinstance(value.get(name), str):
                    found.append((value[name], is_lark))
    return found


class _Products:
    """The products of counts, fed token by token. Groups left open or closed twice do no harm."""

    def __init__(self) -> None:
        self.worst = 1
        self._outer: list[int] = []  # the worst of each group around this place
        self._group = 1  # the worst of this group
        self._last = 1  # of the last element

    def atom(self, product: int) -> None:
        self._last = product
        self._note(product)

    def count(self, token: str) -> None:
        times = max((int(digits[:9]) for digits in re.findall(r"\d+", token)), default=1)
        self._last = min(self._last * max(times, 1), 10**12)
        self._note(self._last)

    def open(self) -> None:
        self._outer.append(self._group)
        self._group = self._last = 1

    def close(self) -> None:
        if self._outer:
            self._last = self._group
            self._group = max(self._outer.pop(), self._last)

    def _note(self, product: int) -> None:
        self._group = max(self._group, product)
        self.worst = max(self.worst, product)


def _repeats_of_regex(pattern: str) -> int:
    """The largest product of counts around one place; 1 where none lies inside of another."""
    products = _Products()
    for token in _IN_REGEX.findall(pattern):
        _feed(products, token)
    return products.worst


def _repeats_of_lark(text: str) -> int:
    """The same of a grammar, in which a terminal's name counts as what the terminal holds."""
    worst, known = 1, dict[str, int]()
    for _ in range(_ROUNDS):
        before, name, products = dict(known), "", _Products()
        for token in _IN_LARK.findall(text):
            if token.endswith(":") and len(token) > 1:
                name, products = re.split(r"[.\[ \t:]", token, maxsplit=1)[0], _Products()
            elif token[0] == '"' and len(token) > 2:
                products.atom(_repeats_of_regex(token[1:-1]))  # a pattern, if it stands in a %json schema
            elif token[0] == "/" and len(token) > 2:
                products.atom(1 if token[1] == "/" else _repeats_of_regex(token[1:-1]))
            elif token[0].isalpha() or token[0] == "_":
                products.atom(known.get(token, 1) if token.isupper() else 1)
            else:
                _feed(products, token)
            known[name] = products.worst
        worst = max(known.values(), default=1)
        if worst > MAX_REPEATS or known == before:
            break
    return worst


def _feed(products: _Products, token: str) -> None:
    if token == "(":
        products.open()
    elif token == ")":
        products.close()
    elif len(token) > 1 and token[0] in "{~":
        products.count(token)
    elif not token.isspace():
        products.atom(1)


# -- frames ---------------------------------------------------------------------------------------------


def _read(pipe: int) -> dict[str, Any] | None:
    head = _exactly(pipe, _LENGTH.size)
    body = _exactly(pipe, _LENGTH.unpack(head)[0]) if head else b""
    if not body:
        return None
    frame: dict[str, Any] = json.loads(body)
    return frame


def _exactly(pipe: int, size: int) -> bytes:
    """So many bytes, or none when the pipe ends before."""
    pieces = bytearray()
    while len(pieces) < size:
        piece = os.read(pipe, size - len(pieces))
        if not piece:
            return b""
        pieces += piece
    return bytes(pieces)


def _write(stream: BinaryIO, frame: dict[str, Any]) -> None:
    body = json.dumps(frame).encode()
    stream.write(_LENGTH.pack(len(body)) + body)
    stream.flush()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the daemon's business
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    serve(0, sys.stdout.buffer)
