"""What comes before the first tensor on an NPU: which device is seen, and whether anybody answers."""

from __future__ import annotations

import os

from engine.errors import EXIT_INIT, StartupError
from worker.platforms.driver_trial import ANSWER_S, Answer, ask

VISIBLE = "ASCEND_RT_VISIBLE_DEVICES"

_QUESTIONS = """import torch
import torch_npu
count = torch.npu.device_count()
tell(devices=count)
if device < count:
    torch.npu.set_device(device)
    torch.npu.synchronize()
    tell(chip=torch.npu.get_device_properties(device).name)"""


def ask_driver(device_id: int, timeout_s: float = ANSWER_S) -> Answer:
    """Open device `device_id` of those visible, in another process."""
    return ask(_QUESTIONS, device_id, timeout_s)


def check_answer(answer: Answer, device_id: int, timeout_s: float = ANSWER_S) -> str:
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
