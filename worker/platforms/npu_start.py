"""What comes before the first tensor on an NPU: which device is seen, and whether anybody answers.

The driver is tried out in a process of its own. Its calls cannot be interrupted, and one that never returns
would take the worker along without a word.
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

VISIBLE = "ASCEND_RT_VISIBLE_DEVICES"
_ANSWER_S = 120.0  # the first import from a cold disk and the first context on a device take half a minute
_DEATH_S = 2.0

# Says how far it has got, a line of JSON each; dies with the worker.
_TRIAL = """
import ctypes, json, sys
ctypes.CDLL(None).prctl(1, 9)
def tell(**found):
    print(json.dumps(found), flush=True)
try:
    import torch
    import torch_npu
    count = torch.npu.device_count()
    tell(devices=count)
    if int(sys.argv[1]) < count:
        torch.npu.set_device(int(sys.argv[1]))
        torch.npu.synchronize()
        tell(chip=torch.npu.get_device_properties(int(sys.argv[1])).name)
except Exception as error:
    words = str(error).strip() or type(error).__name__
    tell(error=words.splitlines()[0], missing=isinstance(error, ImportError))
"""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the runtime and the driver told; what they did not get to is None."""

    devices: int | None = None
    chip: str | None = None
    error: str | None = None
    is_missing: bool = False  # whether the error is that something could not be loaded
    timed_out: bool = False
    exit_code: int | None = None


def ask_driver(device_id: int, timeout_s: float = _ANSWER_S) -> Answer:
    """Open device `device_id` of those visible, in another process that is left alone when it hangs."""
    process = subprocess.Popen(
        [sys.executable, "-c", _TRIAL, str(device_id)],
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
    return Answer(
        devices if isinstance(devices, int) else None,
        chip if isinstance(chip, str) else None,
        error if isinstance(error, str) else None,
        is_missing=found.get("missing") is True,
        timed_out=timed_out,
        exit_code=exit_code,
    )


def check_answer(answer: Answer, device_id: int, timeout_s: float = _ANSWER_S) -> str:
    """The chip's name; StartupError with what stands in the way, and what would be right."""
    count = answer.devices
    if answer.timed_out:
        what = "the Ascend driver" if count is None else f"device {device_id} of {count}"
        fault = f"{what} did not answer within {timeout_s:.0f} s; `npu-smi info` must list the device as OK"
    elif answer.error is not None and answer.is_missing:
        fault = (
            f"torch_npu cannot be loaded: {answer.error}; CANN must be installed and its set_env.sh sourced,"
            " and torch_npu must be of torch's version"
        )
    elif answer.error is not None:
        fault = f"the Ascend runtime refuses device {device_id}: {answer.error}; see `npu-smi info`"
    elif count is not None and device_id >= count:
        legal = f"ids below {count}" if count else "a machine or container with /dev/davinci* devices"
        shown = f", {VISIBLE}={os.environ[VISIBLE]}" if VISIBLE in os.environ else ""
        raise StartupError(
            f"npuDeviceIds: device {device_id} is not among the {count} the driver shows{shown}; {legal}",
            EXIT_INIT,
        )
    elif answer.chip is not None:
        return answer.chip
    else:
        fault = f"the Ascend runtime died, exit code {answer.exit_code}; `import torch_npu` by hand shows why"
    raise StartupError(f"deviceType 'npu': {fault}", EXIT_INIT)


def visible_device(device_id: int, visible: str | None) -> str:
    """ASCEND_RT_VISIBLE_DEVICES for device `device_id` alone, counted within what the variable was."""
    if not visible or not visible.strip():
        return str(device_id)
    return [name.strip() for name in visible.split(",") if name.strip()][device_id]
