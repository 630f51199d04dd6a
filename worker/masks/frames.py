"""What a worker and the lane that computes its masks say to each other; all numbers little-endian.

Requests are a head and its bytes, answers a head alone. The masks lie in memory that both have mapped: behind
one page with what the lane is busy with come the slots, `stride` bytes each; bit t of a slot is token t.
"""

from __future__ import annotations

import struct
from enum import IntEnum


class Ask(IntEnum):
    COMPILE = 1  # bytes: the grammar
    FORGET = 2  # no new path will follow the grammar
    MASK = 3  # bytes: int32 tokens the lane does not know of yet; with a grammar the path begins here
    CLOSE = 4


class Answer(IntEnum):
    HELLO = 1  # the lane is there; number: the stride
    MASK = 2
    REFUSED = 3  # the grammar is none, or too complex by the library's own measures


ASK = struct.Struct("<IIIII")  # what, path, grammar, slot, number of bytes behind it
ANSWER = struct.Struct("<II")  # what, path
BUSY = struct.Struct("<II")  # the grammar being compiled, the path whose mask is being computed; 0: none
BUSY_BYTES = 4096
