"""The worker's side: what it asks of its lane, and a new lane when one has ended.

Nothing here waits for longer than it is told to. A mask that is not there yet is no reason to hold up the
others: whoever needs it sits the step out.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import mmap
import os
import select
import signal
import socket
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterable
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from worker.masks.frames import ANSWER, ASK, BUSY, BUSY_BYTES, Answer, Ask
from worker.masks.keeper import Keeper, KeeperEnded, Vocabulary, VocabularyUnusable

log = logging.getLogger("llm.masks")

_CACHE_BYTES = 64 << 20
_COMPILED_PER_BYTE = 200  # measured on schemas of 20 to 60 kB: 144 and 179 bytes per byte of grammar
_COMPILED_LEAST = 256 << 10
_CULPRITS = 1024  # grammars remembered that have ended a lane
_DEATHS = 2  # of lanes that were busy with one path or grammar, for whatever reason, until it is blamed
_VAIN = 3  # lanes in a row that ended without being busy with anybody, or never began
_SILENT_S = 20.0  # from a lane that has work: it is stopped or stuck, as its timers did not end it
_STARTING_S = 300.0  # the same until its first word: a vocabulary may have to be converted
_RECEIVE = 1 << 16


class State(Enum):
    IDLE = "idle"  # nothing is asked for
    ASKED = "asked"
    THERE = "there"  # the mask lies in its slot
    REFUSED = "refused"


class Trail:
    """One answer's way through its grammar."""

    def __init__(self, grammar: str, number: int, slot: int) -> None:
        self.grammar = grammar
        self.number = number
        self.slot = slot
        self.state = State.IDLE
        self.length = 0  # tokens of the answer that the newest mask asked for lies behind
        self.lane = 0  # which lane knows these tokens
        self.late = False  # a step has gone on without the mask
        self.deaths = 0  # of lanes that were busy with it


class MaskClient:
    """One per worker. Its processes start with the first grammar: most servers never see one."""

    def __init__(self, vocabulary: Vocabulary, slots: int, cache_bytes: int = _CACHE_BYTES) -> None:
        """`slots`: answers with a grammar at the same time; a slot takes memory when it is used."""
        self.vocabulary = vocabulary
        self._num_slots = slots
        self._cache_bytes = cache_bytes
        self._free_slots = list(range(slots))[::-1]
        self._numbers = itertools.count(1)
        self._keeper: Keeper | None = None
        self._unusable = False  # the vocabulary
        self._link: socket.socket | None = None
        self._lane = 0  # counts lanes
        self._greeted = False
        self._vain = 0
        self._heard = 0.0
        self._unsent = bytearray()
        self._unread = bytearray()
        self._known: OrderedDict[str, int] = OrderedDict()  # grammars the lane has -> their numbers
        self._known_bytes = 0
        self._asked: dict[int, Trail] = {}
        self._gone: deque[tuple[int, int]] = deque()  # trails nobody follows any more, and their slots
        self._culprits: OrderedDict[bytes, None] = OrderedDict()
        self._compile_deaths: dict[str, int] = {}
        self._memory_fd = os.memfd_create("mindie_masks")
        os.ftruncate(self._memory_fd, BUSY_BYTES)
        self._busy = mmap.mmap(self._memory_fd, BUSY_BYTES)
        self._masks: NDArray[np.uint8] = np.empty((0, 0), np.uint8)  # [slots, stride]

    # -- what a sampler asks ------------------------------------------------------------------------

    def begin(self, grammar: str) -> Trail | None:
        """None: no slot is free; ask again later."""
        self._let_go()
        if not self._free_slots:
            return None
        trail = Trail(grammar, next(self._numbers), self._free_slots.pop())
        weakref.finalize(trail, self._gone.append, (trail.number, trail.slot)).atexit = False
        if not self._prepare(grammar):
            trail.state = State.REFUSED
        return trail

    def ask(self, trail: Trail, tokens: NDArray[np.int32]) -> None:
        """Ask for what may follow `tokens`, unless that is known. `tokens`: what the grammar has led to."""
        if trail.state is State.REFUSED or (trail.state is not State.IDLE and trail.length == len(tokens)):
            return
        grammar, new = 0, tokens[trail.length :]
        if trail.lane != self._lane:
            if not self._prepare(trail.grammar):
                trail.state = State.REFUSED
                return
            grammar, new = self._known[trail.grammar], tokens
        self._send(Ask.MASK, trail.number, grammar, trail.slot, np.ascontiguousarray(new, "<i4").tobytes())
        trail.state, trail.length, trail.lane = State.ASKED, len(tokens), self._lane
        if not self._asked:
            self._heard = time.monotonic()
        self._asked[trail.number] = trail

    def push(self) -> None:
        """Let what has been asked for reach the lane."""
        self._let_go()
        self._flush()

    def wait(self, trails: Iterable[Trail], seconds: float) -> None:
        """Until none of `trails` is ASKED any more, but no longer than `seconds`."""
        until = time.monotonic() + seconds
        self._receive()
        waiting = [trail for trail in trails if trail.state is State.ASKED]
        while waiting and self._link is not None and (left := until - time.monotonic()) > 0:
            select.select([self._link], [self._link] if self._unsent else [], [], left)
            self._flush()
            self._receive()
            waiting = [trail for trail in waiting if trail.state is State.ASKED]
        if self._asked and time.monotonic() - self._heard > (_SILENT_S if self._greeted else _STARTING_S):
            self._replace_lane("has been silent for too long")

    def mask(self, trail: Trail) -> NDArray[np.uint8]:
        """The bytes of a mask that is THERE, token t in bit t. Not to be kept."""
        mask: NDArray[np.uint8] = self._masks[trail.slot]
        return mask

    def close(self) -> None:
        """End the processes, which would otherwise end with the worker; they start again when needed."""
        self._end_keeper()
        if self._link is not None:
            self._link.close()
            self._link = None

    # -- grammars -----------------------------------------------------------------------------------

    def _prepare(self, grammar: str) -> bool:
        """See to it that the lane has the grammar or is compiling it; False when that is no use."""
        if grammar in self._known:
            self._known.move_to_end(grammar)
            return True
        if self._unusable or _digest(grammar) in self._culprits:
            return False
        if self._link is None:
            self._start_lane()
        if self._link is None:
            return False
        number = next(self._numbers)
        self._send(Ask.COMPILE, 0, number, 0, grammar.encode("utf-8", "surrogatepass"))
        self._known[grammar] = number
        self._known_bytes += _weight(grammar)
        while self._known_bytes > self._cache_bytes and len(self._known) > 1:
            oldest, number = self._known.popitem(last=False)
            self._known_bytes -= _weight(oldest)
            self._send(Ask.FORGET, 0, number, 0)
        return True

    def _let_go(self) -> None:
        while self._gone:
            number, slot = self._gone.popleft()
            self._free_slots.append(slot)
            if self._link is not None:
                self._send(Ask.CLOSE, number, 0, 0)

    # -- the link -----------------------------------------------------------------------------------

    def _send(self, what: Ask, trail: int, grammar: int, slot: int, body: bytes = b"") -> None:
        self._unsent += ASK.pack(what, trail, grammar, slot, len(body)) + body

    def _flush(self) -> None:
        try:
            while self._unsent and self._link is not None:
                del self._unsent[: self._link.send(self._unsent)]
        except BlockingIOError:
            pass
        except OSError:  # it has ended, which the next `wait` finds out
            self._unsent.clear()

    def _receive(self) -> None:
        while self._link is not None:
            try:
                piece = self._link.recv(_RECEIVE)
            except BlockingIOError:
                return
            except OSError:
                piece = b""
            if not piece:
                self._replace_lane("has ended")
                return
            self._heard = time.monotonic()
            self._unread += piece
            whole = len(self._unread) // ANSWER.size * ANSWER.size
            for what, number in ANSWER.iter_unpack(self._unread[:whole]):
                self._take(what, number)
            del self._unread[:whole]

    def _take(self, what: int, number: int) -> None:
        if what == Answer.HELLO:
            self._greeted = True
            self._masks = np.frombuffer(
                mmap.mmap(self._memory_fd, 0), np.uint8, self._num_slots * number, BUSY_BYTES
            ).reshape(self._num_slots, number)
            return
        self._vain = 0
        trail = self._asked.pop(number)
        self._compile_deaths.pop(trail.grammar, None)
        trail.state = State.THERE if what == Answer.MASK else State.REFUSED
        trail.late = False

    # -- lanes that end -----------------------------------------------------------------------------

    def _replace_lane(self, how: str) -> None:
        """Start the next lane. Each trail is led through it again when its next mask is asked for."""
        compiling, masking = BUSY.unpack_from(self._busy)
        suspect = next((text for text, number in self._known.items() if number == compiling), None)
        asked = list(self._asked.values())
        code = self._start_lane()
        log.warning("the process that computes masks %s (code %s); started again", how, code)
        self._vain = 0 if compiling or masking else self._vain + 1
        in_vain = self._unusable or self._vain >= _VAIN
        for trail in asked:
            trail.state = State.REFUSED if in_vain else State.IDLE
            if trail.number == masking:
                trail.deaths += 1
                if code == -signal.SIGVTALRM or trail.deaths >= _DEATHS:
                    self._blame(trail.grammar)
        if in_vain:
            self._vain = 0
        if suspect is not None:
            self._compile_deaths[suspect] = self._compile_deaths.get(suspect, 0) + 1
            if code == -signal.SIGPROF or self._compile_deaths[suspect] >= _DEATHS:
                self._blame(suspect)

    def _blame(self, grammar: str) -> None:
        log.warning("a grammar of %d characters takes too much; it is refused from now on", len(grammar))
        self._compile_deaths.pop(grammar, None)
        self._culprits[_digest(grammar)] = None
        while len(self._culprits) > _CULPRITS:
            self._culprits.popitem(last=False)

    def _start_lane(self) -> int | None:
        """End the lane there is and start another: the exit code, if it can be told."""
        if self._link is not None:
            self._link.close()
        self._link, theirs = socket.socketpair()
        self._link.setblocking(False)
        self._unsent.clear()
        self._unread.clear()
        self._known.clear()
        self._known_bytes = 0
        self._asked.clear()
        self._greeted = False
        self._lane += 1
        self._heard = time.monotonic()
        with theirs:
            try:
                if self._keeper is not None:
                    return self._keeper.start_lane(theirs, self._memory_fd)
            except KeeperEnded:
                self._end_keeper()
            except VocabularyUnusable as error:
                log.error("the model's tokenizer cannot be used with grammars: %s", error)
                self._unusable = True
                self.close()
                return None
            try:
                self._keeper = Keeper(self.vocabulary, self._num_slots)
                return self._keeper.start_lane(theirs, self._memory_fd)
            except (OSError, KeeperEnded) as error:
                log.error("no process can be started to compute masks: %s", error)
                self.close()
                return None

    def _end_keeper(self) -> None:
        if self._keeper is not None:
            self._keeper.end()
            self._keeper = None


def _digest(grammar: str) -> bytes:
    return hashlib.sha256(grammar.encode("utf-8", "surrogatepass")).digest()


def _weight(grammar: str) -> int:
    """Bytes a compiled grammar may take, which the library does not tell."""
    return max(_COMPILED_LEAST, len(grammar) * _COMPILED_PER_BYTE)
