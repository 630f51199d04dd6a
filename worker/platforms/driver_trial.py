"""Asking a device's driver in a process of its own, before the worker's first tensor.

Calls of a driver cannot be interrupted, and one that never returns would take the worker along without a
word. Nor can a process that has asked once still choose which devices it sees.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from engine.errors import EXIT_INIT, StartupError

ANSWER_S = 120.0  # the first import from a cold disk and the first context on a device take half a minute
_DEATH_S = 2.0

# Says how far it has got, a line of JSON each; dies with the worker.
_FRAME = """
import ctypes, json, sys
ctypes.CDLL(None).prctl(1, 9)
device = int(sys.argv[1])
def tell(**found):
    print(json.dumps(found), flush=True)
try:
    {questions}
except Exception as error:
    words = str(error).strip() or type(error).__name__
    tell(error=words.splitlines()[0], missing=isinstance(error, ImportError))
"""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the runtime and the driver told; what they did not get to is None."""

    devices: int | None = None
    chip: str | None = None
    capability: tuple[int, int] | None = None  # of a CUDA device
    error: str | None = None
    is_missing: bool = False  # whether the error is that something could not be loaded
    timed_out: bool = False
    exit_code: int | None = None


def ask(questions: str, device_id: int, timeout_s: float = ANSWER_S) -> Answer:
    """What `questions` tell of `device`, by calls as `tell(devices=2)`; left alone when they hang."""
    process = subprocess.Popen(
        [sys.executable, "-c", _FRAME.format(questions=questions.replace("\n", "\n    ")), str(device_id)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
    )
    try:
        told, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired as expired:
        process.kill()
        if process.stdout is not None:
            process.stdout.close()
        # a process stuck in the driver does not die of being killed: nobody waits for it
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_DEATH_S)
        partial = expired.stdout or b""
        text = partial.decode(errors="replace") if isinstance(partial, bytes) else partial
        return _read(text.splitlines(), timed_out=True)
    return _read(told.splitlines(), exit_code=process.returncode)


def _read(lines: Sequence[str], *, timed_out: bool = False, exit_code: int | None = None) -> Answer:
    found: dict[str, object] = {}
    for line in lines:
        if line.startswith("{"):
            found |= json.loads(line)
    devices, chip, error = found.get("devices"), found.get("chip"), found.get("error")
    capability = found.get("capability")
    return Answer(
        devices if isinstance(devices, int) else None,
        chip if isinstance(chip, str) else None,
        (int(capability[0]), int(capability[1])) if isinstance(capability, list) else None,
        error if isinstance(error, str) else None,
        is_missing=found.get("missing") is True,
        timed_out=timed_out,
        exit_code=exit_code,
    )


def visible_device(device_id: int, visible: str | None) -> str:
    """The variable that names visible devices for device `device_id` alone, counted within what it was."""
    if not visible or not visible.strip():
        return str(device_id)
    return [name.strip() for name in visible.split(",") if name.strip()][device_id]


@dataclass(frozen=True, slots=True)
class Driver:
    """How one kind of driver is asked, and what is said of its answers."""

    device_type: str
    name: str  # "the ... driver"
    tool: str  # shows whether devices are well
    variable: str  # names the devices that are seen
    questions: str  # see `ask`
    where: str  # devices are to be had
    missing: str  # what to say when something cannot be loaded; {error}
    dead: str  # how to find out why the asking process died

    def ask(self, device_id: int, timeout_s: float = ANSWER_S) -> Answer:
        """Open device `device_id` of those visible, in another process."""
        return ask(self.questions, device_id, timeout_s)

    def check(self, answer: Answer, device_id: int, timeout_s: float = ANSWER_S) -> str:
        """The chip's name; StartupError with what stands in the way, and what would be right."""
        count = answer.devices
        if answer.timed_out:
            what = f"the {self.name} driver" if count is None else f"device {device_id} of {count}"
            fault = f"{what} did not answer within {timeout_s:.0f} s; `{self.tool}` must list the device"
        elif answer.error is not None and answer.is_missing:
            fault = self.missing.format(error=answer.error)
        elif answer.error is not None:
            fault = f"the {self.name} runtime refuses device {device_id}: {answer.error}; see `{self.tool}`"
        elif count is not None and device_id >= count:
            legal = f"ids below {count}" if count else self.where
            shown = f", {self.variable}={os.environ[self.variable]}" if self.variable in os.environ else ""
            raise StartupError(
                f"npuDeviceIds: device {device_id} is not among the {count} the driver shows{shown}; {legal}",
                EXIT_INIT,
            )
        elif answer.chip is not None:
            return answer.chip
        else:
            fault = f"the {self.name} runtime died, exit code {answer.exit_code}; {self.dead}"
        raise StartupError(f"deviceType {self.device_type!r}: {fault}", EXIT_INIT)

    def show_only(self, device_id: int) -> None:
        """Hide the others from this process, which has not asked yet. Ids count within what is visible."""
        os.environ[self.variable] = visible_device(device_id, os.environ.get(self.variable))
