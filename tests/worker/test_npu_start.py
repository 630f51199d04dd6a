"""What an operator reads when an NPU cannot be had, from processes that really hang, die or miss a library.

The packages of the driver are stood in for by files that behave as the broken ones do; that the real ones are
asked in the right way is shown in tests/npu_sim.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from engine.errors import EXIT_INIT, StartupError
from worker.platforms.driver_trial import Answer, visible_device
from worker.platforms.npu_chips import generation_of
from worker.platforms.npu_start import ASCEND

_TORCH = """
class npu:
    @staticmethod
    def device_count(): return 2
    @staticmethod
    def set_device(index): {set_device}
    @staticmethod
    def synchronize(): pass
    @staticmethod
    def get_device_properties(index):
        return type("Properties", (), {{"name": f"Ascend910B{{index}}"}})
"""


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which the process that asks finds its packages first."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delenv("ASCEND_RT_VISIBLE_DEVICES", raising=False)
    (tmp_path / "torch_npu.py").write_text("")
    (tmp_path / "torch.py").write_text(_TORCH.format(set_device="pass"))
    return tmp_path


def _refused(answer: Answer, device_id: int, timeout_s: float = 60.0) -> str:
    with pytest.raises(StartupError) as caught:
        ASCEND.check(answer, device_id, timeout_s)
    assert caught.value.exit_code == EXIT_INIT
    (line,) = str(caught.value).splitlines()
    return line


def test_a_device_that_answers_says_what_it_is(packages: Path) -> None:
    answer = ASCEND.ask(1)
    assert answer.devices == 2
    assert ASCEND.check(answer, 1) == "Ascend910B1"


def test_too_few_devices(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = _refused(ASCEND.ask(2), 2)
    assert "npuDeviceIds" in line and "device 2" in line and "ids below 2" in line
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "4,5")
    assert "ASCEND_RT_VISIBLE_DEVICES=4,5" in _refused(ASCEND.ask(2), 2)
    assert "/dev/davinci" in _refused(Answer(devices=0), 0)


def test_a_driver_that_is_silent(packages: Path) -> None:
    (packages / "torch.py").write_text(_TORCH.format(set_device="__import__('time').sleep(300)"))
    start = time.monotonic()
    answer = ASCEND.ask(0, timeout_s=3.0)
    assert answer.timed_out
    assert time.monotonic() - start < 60
    line = _refused(answer, 0, 3.0)
    assert "deviceType 'npu'" in line and "did not answer within 3 s" in line and "npu-smi info" in line


def test_torch_npu_without_cann(packages: Path) -> None:
    why = "libhccl.so: cannot open shared object file: No such file or directory"
    (packages / "torch_npu.py").write_text(f"raise ImportError({why!r})")
    line = _refused(ASCEND.ask(0), 0)
    assert why in line and "set_env.sh" in line


def test_a_runtime_that_refuses(packages: Path) -> None:
    (packages / "torch.py").write_text(_TORCH.format(set_device="raise RuntimeError('drvErr 87')"))
    line = _refused(ASCEND.ask(0), 0)
    assert "refuses device 0: drvErr 87;" in line


def test_a_runtime_that_dies(packages: Path) -> None:
    (packages / "torch_npu.py").write_text("import os; os.abort()")
    assert "exit code -6" in _refused(ASCEND.ask(0), 0)


@pytest.mark.parametrize(
    ("device", "visible", "want"),
    [(3, None, "3"), (0, "", "0"), (1, "4,5", "5"), (0, " 6 , 7", "6")],
)
def test_one_device_is_left_visible(device: int, visible: str | None, want: str) -> None:
    assert visible_device(device, visible) == want


@pytest.mark.parametrize(
    ("chip", "name", "serves"),
    [
        ("Ascend910B1", "A2", True),
        ("Ascend910B4-1", "A2", True),
        ("Ascend910_9391", "A3", True),
        ("Ascend310P3", "310P", False),
        ("Ascend910B", "910 of the first generation", False),
        ("Ascend910ProB", "910 of the first generation", False),
    ],
)
def test_generations(chip: str, name: str, serves: bool) -> None:
    generation = generation_of(chip)
    assert generation is not None
    assert (generation.name, generation.serves) == (name, serves)


def test_a_chip_that_nobody_knows() -> None:
    assert generation_of("Ascend1000X") is None
