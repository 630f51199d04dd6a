"""A lane: the process in which a worker's grammars are compiled and its masks computed.

Native code cannot be stopped from within, so the kernel does it: a timer of processor time runs beside each
piece of work and ends the process when the piece takes more than its share. What the lane was busy with is
written down beforehand where the worker can read it. A compile runs in a thread of its own, for the library
lets go of the interpreter meanwhile: those who only want a mask do not wait for it.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import resource
import select
import signal
import socket
import threading
from collections import deque
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import NamedTuple

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from engine.grammar_limits import PARSER_LIMITS
from worker.masks.frames import ANSWER, ASK, BUSY, BUSY_BYTES, Answer, Ask

COMPILE_S = 2.0  # of processor time, masks computed meanwhile included; reliability.md section 2
MASK_S = 0.3  # of processor time, a compile that runs meanwhile included: three times what a trial allows
MEMORY = 4 << 30  # bytes beyond what the vocabulary takes
_RECEIVE = 1 << 20
_TOKENS_AT_ONCE = 256  # of an answer that is followed again from its beginning; each piece has MASK_S


class _Mask(NamedTuple):
    path: int
    slot: int
    tokens: list[int]


@dataclass(slots=True, eq=False)
class _Template:
    """A grammar; `matcher` stays None when it is refused."""

    number: int
    text: str
    matcher: LLMatcher | None = None
    compiled: bool = False
    waiting: list[_Mask] = field(default_factory=list)


class Lane:
    def __init__(self, vocabulary: LLTokenizer, link: socket.socket, memory_fd: int, slots: int) -> None:
        self._vocabulary = vocabulary
        self._limits = LLParserLimits(**PARSER_LIMITS)
        self._link = link
        self._stride = -(-vocabulary.vocab_size // 32) * 4
        os.ftruncate(memory_fd, BUSY_BYTES + slots * self._stride)
        self._memory = mmap.mmap(memory_fd, 0)
        self._slots = ctypes.addressof(ctypes.c_char.from_buffer(self._memory)) + BUSY_BYTES
        self._busy = memoryview(self._memory).cast("I")
        self._templates: dict[int, _Template] = {}
        self._paths: dict[int, LLMatcher] = {}
        self._to_compile: SimpleQueue[_Template] = SimpleQueue()
        self._compiled: deque[_Template] = deque()
        self._woken, self._wake = os.pipe()
        self._answers = bytearray()

    def serve(self) -> None:
        """Until the worker closes its end."""
        BUSY.pack_into(self._memory, 0, 0, 0)
        threading.Thread(target=self._compile_all, name="compile", daemon=True).start()
        self._answer(Answer.HELLO, self._stride)
        received = bytearray()
        while True:
            self._link.sendall(self._answers)
            self._answers.clear()
            ready, _, _ = select.select([self._link.fileno(), self._woken], [], [])
            if self._woken in ready:
                os.read(self._woken, _RECEIVE)
                self._serve_compiled()
            if self._link.fileno() in ready:
                piece = self._link.recv(_RECEIVE)
                if not piece:
                    return
                received += piece
                del received[: self._serve_asked(received)]
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)

    def _serve_asked(self, received: bytearray) -> int:
        """Do what is asked for; the number of bytes it took."""
        at = 0
        while len(received) - at >= ASK.size:
            what, path, grammar, slot, size = ASK.unpack_from(received, at)
            if len(received) - at - ASK.size < size:
                break
            body = bytes(received[at + ASK.size : at + ASK.size + size])
            at += ASK.size + size
            if what == Ask.MASK:
                template = self._templates[grammar] if grammar else None
                self._mask(_Mask(path, slot, memoryview(body).cast("i").tolist()), template)
            elif what == Ask.COMPILE:
                template = self._templates[grammar] = _Template(
                    grammar, body.decode("utf-8", "surrogatepass")
                )
                self._to_compile.put(template)
            elif what == Ask.FORGET:
                del self._templates[grammar]
            else:
                self._paths.pop(path, None)
        return at

    def _answer(self, what: Answer, path: int) -> None:
        self._answers += ANSWER.pack(what, path)

    # -- masks --------------------------------------------------------------------------------------

    def _mask(self, mask: _Mask, template: _Template | None) -> None:
        """`template`: None when the path has begun before."""
        if template is not None and not template.compiled:
            template.waiting.append(mask)
            return
        self._busy[1] = mask.path
        refused = True
        with contextlib.suppress(BaseException):  # a panic of the library is no Exception
            signal.setitimer(signal.ITIMER_VIRTUAL, MASK_S)
            if template is not None and template.matcher is not None:
                self._paths[mask.path] = template.matcher.deep_copy()
            matcher = self._paths.get(mask.path)
            if matcher is not None:
                for at in range(0, len(mask.tokens), _TOKENS_AT_ONCE):
                    signal.setitimer(signal.ITIMER_VIRTUAL, MASK_S)
                    matcher.consume_tokens(mask.tokens[at : at + _TOKENS_AT_ONCE])
                matcher.unsafe_compute_mask_ptr(self._slots + mask.slot * self._stride, self._stride)
                refused = matcher.is_error()
        self._busy[1] = 0
        self._answer(Answer.REFUSED if refused else Answer.MASK, mask.path)

    def _serve_compiled(self) -> None:
        while self._compiled:
            template = self._compiled.popleft()
            template.compiled = True
            for mask in template.waiting:
                self._mask(mask, template)
            template.waiting.clear()

    # -- compiling ----------------------------------------------------------------------------------

    def _compile_all(self) -> None:
        while True:
            template = self._to_compile.get()
            self._busy[0] = template.number
            signal.setitimer(signal.ITIMER_PROF, COMPILE_S)
            with contextlib.suppress(BaseException):  # a panic of the library is no Exception
                matcher = LLMatcher(self._vocabulary, template.text, log_level=0, limits=self._limits)
                matcher.compute_bitmask()  # the first mask is what takes long; copies then know how
                template.matcher = matcher
            signal.setitimer(signal.ITIMER_PROF, 0)
            self._busy[0] = 0
            self._compiled.append(template)
            os.write(self._wake, b"\0")


def restrict() -> None:
    """Call it in the lane's process, before its first grammar."""
    for number in (signal.SIGPROF, signal.SIGVTALRM, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    with open("/proc/self/statm", encoding="ascii") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    for kind, limit in ((resource.RLIMIT_AS, taken + MEMORY), (resource.RLIMIT_CORE, 0)):
        _, hard = resource.getrlimit(kind)
        if hard == resource.RLIM_INFINITY or limit < hard:
            resource.setrlimit(kind, (limit, limit))
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write("1000")
