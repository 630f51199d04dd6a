"""What comes before the first tensor on an NVIDIA GPU: which device is seen, and whether anybody answers."""

from __future__ import annotations

from engine.errors import EXIT_INIT, StartupError
from worker.platforms.driver_trial import Answer, Driver

OLDEST = (8, 0)  # compute capability: older chips have no bfloat16 in their matrix units
FP8 = (8, 9)  # the oldest with fp8 in them

_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE, also where CUDA_VISIBLE_DEVICES names none that exists
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*

# the driver's own library answers in a fraction of the time that torch takes to load
NVIDIA = Driver(
    device_type="cuda",
    name="NVIDIA",
    tool="nvidia-smi",
    variable="CUDA_VISIBLE_DEVICES",
    questions=f"""try:
    cuda = ctypes.CDLL("libcuda.so.1")
except OSError as error:
    raise ImportError(str(error)) from None
def call(name, *arguments):
    code = getattr(cuda, name)(*arguments)
    if code not in (0, {_NO_DEVICE}):
        words = ctypes.c_char_p()
        cuda.cuGetErrorString(code, ctypes.byref(words))
        raise RuntimeError((words.value or b"unknown error").decode() + f" ({{name}}, error {{code}})")
    return code
count, value, context = ctypes.c_int(), ctypes.c_int(), ctypes.c_void_p()
if call("cuInit", 0) == 0:
    call("cuDeviceGetCount", ctypes.byref(count))
tell(devices=count.value)
if device < count.value:
    name, capability = ctypes.create_string_buffer(256), []
    for attribute in ({_MAJOR}, {_MINOR}):
        call("cuDeviceGetAttribute", ctypes.byref(value), attribute, device)
        capability.append(value.value)
    call("cuDeviceGetName", name, 256, device)
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    tell(chip=name.value.decode(), capability=capability)""",
    where="a machine with an NVIDIA GPU, or a container that is given one (docker run --gpus)",
    missing="no NVIDIA driver: {error}; install it, or give the container its GPUs (docker run --gpus)",
    dead="`nvidia-smi` may show why",
)


def find_gpu(device_id: int) -> tuple[str, tuple[int, int]]:
    """Name and compute capability of device `device_id` of those visible, which has answered.

    StartupError: there is no driver or no such device, it does not answer, or it is too old.
    """
    return check_gpu(NVIDIA.ask(device_id), device_id)


def check_gpu(answer: Answer, device_id: int) -> tuple[str, tuple[int, int]]:
    """As `find_gpu`, of what has been answered."""
    chip = NVIDIA.check(answer, device_id)
    capability = answer.capability or (0, 0)
    if capability < OLDEST:
        raise StartupError(
            f"deviceType 'cuda': {chip} has compute capability {dotted(capability)}; bfloat16 takes"
            f" {dotted(OLDEST)} (Ampere) or newer; deviceType 'cpu' serves here",
            EXIT_INIT,
        )
    return chip, capability


def dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
