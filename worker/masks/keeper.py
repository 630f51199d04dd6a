"""Our end of a running keeper: worker.masks.program."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path

_PROGRAM = Path(__file__).with_name("program.py")
_ANSWER_S = 1.0  # it has nothing to do but answer
_PACKET = 1 << 16


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Where a model's tokenizer lies, and what it is for."""

    model_dir: Path
    trust_remote_code: bool
    size: int  # of the model; ids beyond the tokenizer's are never legal
    eos: Seq[int]


class KeeperEnded(Exception):
    """It is not there any more."""


class VocabularyUnusable(Exception):
    """No lane can ever be started."""


class Keeper:
    def __init__(self, vocabulary: Vocabulary, slots: int) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(_PROGRAM), str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # a native panic quotes what it was given
                pass_fds=[theirs.fileno()],
            )
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        self._control = ours
        self._control.settimeout(_ANSWER_S)
        self._control.send(
            json.dumps(
                {
                    "model_dir": str(vocabulary.model_dir),
                    "trust_remote_code": vocabulary.trust_remote_code,
                    "size": vocabulary.size,
                    "eos": list(vocabulary.eos),
                    "slots": slots,
                }
            ).encode()
        )
        self._has_lane = False

    def start_lane(self, link: socket.socket, memory_fd: int) -> int | None:
        """End the lane there is and start another: the exit code, if there was one.

        What is written to the other end of `link` waits there until the lane reads it. Raises KeeperEnded,
        VocabularyUnusable.
        """
        try:
            socket.send_fds(self._control, [b"\0"], [link.fileno(), memory_fd])
        except OSError:
            self._hear()
            raise KeeperEnded from None
        code = self._hear() if self._has_lane else None
        self._has_lane = True
        return code

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._control.close()

    def _hear(self) -> int:
        try:
            packet = self._control.recv(_PACKET)
        except OSError:
            packet = b""
        if not packet:
            raise KeeperEnded
        said = json.loads(packet)
        if "error" in said:
            raise VocabularyUnusable(said["error"])
        code: int = said["code"]
        return code
