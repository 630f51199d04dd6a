"""The keeper of a worker's lane: reads the vocabulary once and forks a lane whenever there is none.

A program of its own, started by worker.masks.keeper, because a worker has threads by the time its first
grammar comes and must not fork. It has none itself, and does nothing but wait: so a lane that was ended is
replaced within milliseconds, while reading the vocabulary takes seconds for a large one.

Arguments: the descriptor of a SEQPACKET socket and the worker's process id. First comes the vocabulary as
JSON, then a packet for every lane wanted, with the lane's socket and the memory for masks. If there was a
lane it is ended, and `{"code"}` is answered, its exit code as os.waitstatus_to_exitcode has it. `{"error"}`,
and the end of the process, is the answer to a vocabulary that cannot be used.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llguidance import LLTokenizer

_PACKET = 1 << 16
_PR_SET_PDEATHSIG = 1


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    die_with(int(sys.argv[2]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the daemon's business
    given = json.loads(control.recv(_PACKET))
    try:
        from engine.title import PROCESS_NAME, set_process_name, show_command

        set_process_name()
        show_command(f"{PROCESS_NAME} masks")
        vocabulary = _vocabulary(given)
    except Exception as error:  # a native library, and whatever is wrong with the installation
        control.send(json.dumps({"error": f"{type(error).__name__}: {error}"[:1000]}).encode())
        return
    _keep(control, vocabulary, given["slots"])


def die_with(parent: int) -> None:
    """Let the kernel end this process when `parent` dies; not inherited by forked children."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def _vocabulary(given: dict[str, Any]) -> LLTokenizer:
    from llguidance import LLTokenizer

    from engine.grammar_limits import vocabulary_shape
    from engine.tokenizer_files import load_tokenizer

    tokenizer = load_tokenizer(Path(given["model_dir"]), given["trust_remote_code"])
    size, ends = vocabulary_shape(
        given["size"], tokenizer.get_vocab_size(with_added_tokens=True), given["eos"]
    )
    return LLTokenizer(tokenizer.to_str(), n_vocab=size, eos_token=ends)


def _keep(control: socket.socket, vocabulary: LLTokenizer, slots: int) -> None:
    lane = 0
    while True:
        packet, fds, _, _ = socket.recv_fds(control, 1, 2)
        if lane:
            os.kill(lane, signal.SIGKILL)  # not reaped yet, so the id is still its own
            code = os.waitstatus_to_exitcode(os.waitpid(lane, 0)[1])
            if packet:
                control.send(json.dumps({"code": code}).encode())
        if not packet:
            return
        lane = _fork(control, vocabulary, fds, slots)
        for fd in fds:
            os.close(fd)


def _fork(control: socket.socket, vocabulary: LLTokenizer, fds: list[int], slots: int) -> int:
    from worker.masks.lane import Lane, restrict

    keeper = os.getpid()
    process = os.fork()
    if process:
        return process
    try:
        die_with(keeper)
        control.close()
        restrict()
        Lane(vocabulary, socket.socket(fileno=fds[0]), fds[1], slots).serve()
    finally:
        os._exit(0)


if __name__ == "__main__":
    # as daemon/launch.py does: the modules go by their short names wherever they are installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    main()
