"""What comes before the first tensor on an NPU: which device is seen, and whether anybody answers."""

from __future__ import annotations

from worker.platforms.driver_trial import Driver

ASCEND = Driver(
    device_type="npu",
    name="Ascend",
    tool="npu-smi info",
    variable="ASCEND_RT_VISIBLE_DEVICES",
    questions="""import torch
import torch_npu
count = torch.npu.device_count()
tell(devices=count)
if device < count:
    torch.npu.set_device(device)
    torch.npu.synchronize()
    tell(chip=torch.npu.get_device_properties(device).name)""",
    where="a machine or container with /dev/davinci* devices",
    missing="torch_npu cannot be loaded: {error}; CANN must be installed and its set_env.sh sourced,"
    " and torch_npu must be of torch's version",
    dead="`import torch_npu` by hand shows why",
)
