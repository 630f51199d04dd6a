"""What an operator reads when a GPU cannot be had, and which one a worker sees.

The driver's library is stood in for by one that is compiled here and answers as it is told.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from engine.errors import EXIT_INIT, StartupError
from worker.platforms.cuda_start import NVIDIA, check_gpu, find_gpu
from worker.platforms.driver_trial import Answer

_DRIVER = """
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
static int told(const char *name) { const char *text = getenv(name); return text ? atoi(text) : 0; }
int cuInit(unsigned flags) {
    if (told("INIT_SLEEPS")) sleep(300);
    if (told("INIT_DIES")) abort();
    return told("INIT_CODE");
}
int cuDeviceGetCount(int *count) { *count = 2; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? told("MAJOR") : 0;
    return 0;
}
int cuDeviceGetName(char *name, int length, int device) { strncpy(name, "NVIDIA H200", length); return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { return told("CONTEXT_CODE"); }
int cuGetErrorString(int code, const char **words) { *words = "device busy"; return 0; }
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("driver")
    (folder / "driver.c").write_text(_DRIVER)
    command = [compiler, "-shared", "-fPIC", "-o", str(folder / "libcuda.so.1"), str(folder / "driver.c")]
    subprocess.run(command, check=True)
    return folder


@pytest.fixture
def driver(library: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Its environment says how the driver behaves."""
    monkeypatch.setenv("LD_LIBRARY_PATH", str(library))
    monkeypatch.setenv("MAJOR", "9")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return monkeypatch


def refused(device_id: int = 0, answer: Answer | None = None) -> str:
    with pytest.raises(StartupError) as caught:
        check_gpu(answer or NVIDIA.ask(device_id), device_id)
    assert caught.value.exit_code == EXIT_INIT
    (line,) = str(caught.value).splitlines()
    return line


def test_a_gpu_that_answers_says_what_it_is(driver: pytest.MonkeyPatch) -> None:
    assert find_gpu(1) == ("NVIDIA H200", (9, 0))


def test_too_few_gpus(driver: pytest.MonkeyPatch) -> None:
    line = refused(2)
    assert "npuDeviceIds: device 2 is not among the 2" in line and "ids below 2" in line
    driver.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    assert "CUDA_VISIBLE_DEVICES=4,5" in refused(2)
    driver.setenv("INIT_CODE", "100")
    line = refused(0)
    assert "not among the 0" in line and "--gpus" in line


def test_a_gpu_without_bfloat16(driver: pytest.MonkeyPatch) -> None:
    driver.setenv("MAJOR", "7")
    line = refused()
    assert "NVIDIA H200 has compute capability 7.0" in line and "8.0 (Ampere) or newer" in line


def test_a_gpu_that_somebody_else_holds(driver: pytest.MonkeyPatch) -> None:
    driver.setenv("CONTEXT_CODE", "46")
    assert "refuses device 0: device busy (cuDevicePrimaryCtxRetain, error 46); see `nvidia-smi`" in refused()


def test_a_driver_that_is_silent(driver: pytest.MonkeyPatch) -> None:
    driver.setenv("INIT_SLEEPS", "1")
    answer = NVIDIA.ask(0, timeout_s=3.0)
    assert answer.timed_out
    assert "the NVIDIA driver did not answer within" in refused(answer=answer)


def test_a_driver_that_dies(driver: pytest.MonkeyPatch) -> None:
    driver.setenv("INIT_DIES", "1")
    assert "exit code -6" in refused()


def test_no_driver() -> None:
    answer = Answer(error="libcuda.so.1: cannot open shared object file", is_missing=True)
    line = refused(answer=answer)
    assert "deviceType 'cuda': no NVIDIA driver: libcuda.so.1" in line and "--gpus" in line


@pytest.mark.parametrize(
    ("device", "visible", "want"), [(1, None, "1"), (1, "4,5", "5"), (0, "GPU-5af1, GPU-6b", "GPU-5af1")]
)
def test_one_gpu_is_left_visible(
    monkeypatch: pytest.MonkeyPatch, device: int, visible: str | None, want: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
    NVIDIA.show_only(device)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == want
