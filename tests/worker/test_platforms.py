"""Choosing a platform, the container's memory limits, and the start-up probe."""

from __future__ import annotations

import ctypes
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from engine.errors import EXIT_INIT, StartupError
from worker.layers.linear import (
    Float32Scratch,
    InvariantLinear,
    PackedLinear,
    PlainLinear,
    UpcastingLinear,
    filled_rows,
)
from worker.native import NativeLinear
from worker.native.library import all_kernels
from worker.platforms import registry
from worker.platforms.base import Linear
from worker.platforms.cpu import CpuPlatform
from worker.platforms.cpu_kernels import LinearKernels, Native
from worker.platforms.memory_limits import MemoryInfo, read_memory
from worker.platforms.registry import _ACCELERATORS, PLATFORMS, _Accelerator, select_platform

MIB = 2**20


def test_auto_finds_the_cpu_here() -> None:
    assert select_platform("auto").name == "cpu"
    assert select_platform("cpu").name == "cpu"


def test_another_thread_computes_with_as_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenMP, which the compiled kernels ask, would give it what the environment says."""
    openmp = ctypes.CDLL("libgomp.so.1")
    before, wanted = torch.get_num_threads(), openmp.omp_get_max_threads() + 1
    platform = CpuPlatform()
    platform.set_up(0, 1, wanted)
    with ThreadPoolExecutor(1) as plain, ThreadPoolExecutor(1, initializer=platform.set_up_thread) as set_up:
        assert plain.submit(openmp.omp_get_max_threads).result() != wanted
        assert set_up.submit(openmp.omp_get_max_threads).result() == wanted
    torch.set_num_threads(before)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Makes this one have drivers of accelerators; `missing` and `silent`: why they cannot be used."""
    monkeypatch.setattr(registry, "Path", lambda folder: tmp_path)

    def make(*drivers: str, missing: str | None = None, silent: str | None = None) -> None:
        for name in ("npu", "cuda"):
            monkeypatch.setitem(_ACCELERATORS, name, _Accelerator((f"{name}[0-9]",), lambda: missing))
            monkeypatch.setitem(PLATFORMS, name, ("worker.platforms.cpu", f"{name} platform"))
            if name in drivers:
                (tmp_path / f"{name}0").touch()

        def find_gpu(device_id: int) -> None:
            if silent is not None:
                raise StartupError(silent, EXIT_INIT)

        monkeypatch.setattr(registry, "find_gpu", find_gpu)

    return make


@pytest.mark.parametrize("device_type", ["npu", "cuda"])
def test_a_named_device_that_cannot_be_used_is_refused(
    machine: Callable[..., None], device_type: str
) -> None:
    machine("npu", "cuda", missing="there is no package for it")
    with pytest.raises(
        StartupError, match=f"deviceType '{device_type}': there is no package for it"
    ) as caught:
        select_platform(device_type)
    assert caught.value.exit_code == EXIT_INIT


def test_cuda_is_refused_here_in_one_line() -> None:
    """By the build of torch, or where it has CUDA by the driver; with a GPU there is nothing to refuse."""
    if any(Path("/dev").glob("nvidia[0-9]*")):
        pytest.skip("this machine has a GPU")
    with pytest.raises(StartupError) as caught:
        select_platform("cuda").set_up(0, 1, 1)
    assert caught.value.exit_code == EXIT_INIT
    (line,) = str(caught.value).splitlines()
    assert line.startswith("deviceType 'cuda': ")


def test_auto_leaves_a_device_alone_that_has_no_driver(
    machine: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    """Their packages may be installed in an image that also runs on machines without them."""
    machine()
    assert select_platform("auto").name == "cpu"
    assert not caplog.records


@pytest.mark.parametrize(("drivers", "chosen"), [(["npu", "cuda"], "npu"), (["cuda"], "cuda")])
def test_auto_takes_the_first_accelerator_that_is_there(
    machine: Callable[..., None], drivers: list[str], chosen: str
) -> None:
    machine(*drivers)
    with pytest.raises(AttributeError, match=f"{chosen} platform"):
        select_platform("auto")


@pytest.mark.parametrize("reasons", [{"missing": "torch is of no use"}, {"silent": "it is too old"}])
def test_auto_says_so_when_an_accelerator_lies_idle(
    machine: Callable[..., None], caplog: pytest.LogCaptureFixture, reasons: dict[str, str]
) -> None:
    machine("cuda", **reasons)
    assert select_platform("auto").name == "cpu"
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == f"deviceType 'auto': cuda is not used: {next(iter(reasons.values()))}"
    caplog.clear()
    select_platform("cpu")
    assert not caplog.records


@pytest.mark.parametrize(
    ("requested", "stored", "want"),
    [
        ("auto", torch.bfloat16, torch.bfloat16),
        ("auto", torch.float16, torch.float32),
        ("float16", torch.bfloat16, torch.float32),
        ("bfloat16", torch.float32, torch.bfloat16),
        ("float32", torch.bfloat16, torch.float32),
    ],
)
def test_weight_dtype(requested: str, stored: torch.dtype, want: torch.dtype) -> None:
    assert CpuPlatform().weight_dtype(requested, stored) == want  # type: ignore[arg-type]


def test_threads_are_the_cores_of_the_affinity_mask_over_the_workers() -> None:
    cores = len(os.sched_getaffinity(0))
    CpuPlatform().set_up(device_id=0, num_workers=1, threads=0)
    assert torch.get_num_threads() == cores
    CpuPlatform().set_up(device_id=0, num_workers=cores + 1, threads=0)
    assert torch.get_num_threads() == 1
    CpuPlatform().set_up(device_id=0, num_workers=1, threads=3)
    assert torch.get_num_threads() == 3


def test_freed_memory_is_kept_until_it_is_given_back() -> None:
    """In a process of its own: the setting stays. A block below the buffer keeps the heap from shrinking."""
    script = (
        "import psutil, torch\n"
        "from worker.platforms.cpu import CpuPlatform\n"
        "platform = CpuPlatform()\n"
        "platform.set_up(0, 1, 1)\n"
        "held = psutil.Process().memory_info\n"
        "weight = torch.ones(50 * 2**20)\n"
        "above = torch.ones(2**20)\n"
        "before = held().rss\n"
        "del weight\n"
        "kept = held().rss\n"
        "platform.give_back_memory()\n"
        "print((before - kept) >> 20, (before - held().rss) >> 20)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    kept_less, given_back = map(int, done.stdout.split())
    assert kept_less < 20 and given_back > 180


@pytest.fixture
def root(tmp_path: Path) -> Callable[[str, dict[str, dict[str, int | str]]], Path]:
    """A file system with 800 of 1000 MiB available and the given control groups."""

    def make(cgroup: str, groups: dict[str, dict[str, int | str]]) -> Path:
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/meminfo").write_text(f"MemTotal: {1000 * 1024} kB\nMemAvailable: {800 * 1024} kB\n")
        (tmp_path / "proc/self/cgroup").write_text(cgroup)
        for folder, files in groups.items():
            path = tmp_path / "sys/fs/cgroup" / folder
            path.mkdir(parents=True, exist_ok=True)
            for name, value in files.items():
                (path / name).write_text(f"{value}\n")
        return tmp_path

    return make


Root = Callable[[str, dict[str, dict[str, int | str]]], Path]


def test_memory_without_groups_is_that_of_the_machine(root: Root) -> None:
    memory = read_memory(root("0::/\n", {}))
    assert (memory.available, memory.total) == (800 * MIB, 1000 * MIB)


def test_a_v2_limit_of_a_parent_counts_and_page_cache_does_not(root: Root) -> None:
    groups: dict[str, dict[str, int | str]] = {
        "pod": {
            "memory.max": 500 * MIB,
            "memory.current": 300 * MIB,
            "memory.stat": f"anon 1\ninactive_file {60 * MIB}\nactive_file {40 * MIB}",
        },
        "pod/box": {"memory.max": "max", "memory.current": 5 * MIB},
    }
    memory = read_memory(root("0::/pod/box\n", groups))
    assert (memory.available, memory.total) == (300 * MIB, 500 * MIB)


def test_a_v1_limit_seen_only_at_the_mount_point_counts(root: Root) -> None:
    groups: dict[str, dict[str, int | str]] = {
        "memory": {"memory.limit_in_bytes": 400 * MIB, "memory.usage_in_bytes": 100 * MIB}
    }
    memory = read_memory(root("3:cpu:/\n4:memory:/of/the/host\n", groups))
    assert (memory.available, memory.total) == (300 * MIB, 400 * MIB)


def test_an_exceeded_limit_leaves_nothing(root: Root) -> None:
    groups: dict[str, dict[str, int | str]] = {"": {"memory.max": 10 * MIB, "memory.current": 90 * MIB}}
    assert read_memory(root("0::/\n", groups)).available == 0


def test_the_real_machine_has_memory() -> None:
    memory = read_memory(Path("/"))
    assert 0 < memory.available <= memory.total


def test_workers_share_the_automatic_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    platform = CpuPlatform()
    monkeypatch.setattr(platform, "memory", lambda: MemoryInfo(available=800 * MIB, total=1000 * MIB))
    assert platform.kv_budget(1, memory_fraction=0.8) == 200 * MIB
    assert platform.kv_budget(2, memory_fraction=0.8) == 100 * MIB


# sums of 40 products: float32 differs in the last bits, bfloat16 by one rounding of a result of order 10
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.bfloat16: {"rtol": 1e-2, "atol": 1e-2}}


def packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN packs such weights here: bfloat16 takes a processor with AVX-512 or newer."""
    try:
        PackedLinear(torch.eye(3).to(dtype), None)
    except RuntimeError:
        return False
    return True


PACKED = torch.bfloat16 if packs(torch.bfloat16) else torch.float32


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("with_bias", [True, False])
def test_all_linears_compute_the_same(dtype: torch.dtype, with_bias: bool) -> None:
    torch.manual_seed(0)
    scratch = Float32Scratch()
    for outputs in (24, 8, 56):  # the scratch holds weights of other sizes in between
        weight = torch.randn(outputs, 40).to(dtype)
        bias = torch.randn(outputs).to(dtype) if with_bias else None
        plain = PlainLinear(weight, bias)
        linears: list[Linear] = [plain, UpcastingLinear(plain, scratch)]
        if packs(dtype):
            packed = PackedLinear(weight, bias)
            assert torch.equal(packed.dense(), weight)
            linears += [packed, UpcastingLinear(packed, scratch)]
        for rows in (1, 7, 33, 49, UpcastingLinear.MIN_ROWS):
            x = torch.randn(rows, 40).to(dtype)
            want = (x.double() @ weight.double().T + (0 if bias is None else bias.double())).to(dtype)
            for linear in linears:
                torch.testing.assert_close(linear(x), want, **TOLERANCE[dtype])


def test_kernels_are_made_for_few_numbers_of_rows() -> None:
    filled = [filled_rows(rows) for rows in range(1, 4097)]
    assert filled[:16] == list(range(1, 17))
    assert all(rows <= size <= rows * 9 / 8 for rows, size in enumerate(filled, start=1))
    assert len(set(filled)) == 16 + 8 * 8
    assert all(filled_rows(size) == size for size in filled)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("upcast", [True, False])
def test_the_platform_builds_what_the_probe_found(
    monkeypatch: pytest.MonkeyPatch, packed: bool, upcast: bool
) -> None:
    probed: list[torch.dtype] = []

    def probe(dtype: torch.dtype) -> LinearKernels:
        probed.append(dtype)
        return LinearKernels(packed, upcast)

    monkeypatch.setattr("worker.platforms.cpu.probe_linears", probe)
    platform = CpuPlatform()
    made = [platform.pack_linear(torch.eye(3, dtype=PACKED), None) for _ in range(2)]
    want = UpcastingLinear if upcast else PackedLinear if packed else PlainLinear
    assert [type(linear.fast) for linear in made if isinstance(linear, InvariantLinear)] == [want, want]
    assert probed == [PACKED]
    assert platform.wide_rows == (UpcastingLinear.MIN_ROWS if upcast else None)
    assert ("packed" in platform.describe(), "prefills in float32" in platform.describe()) == (packed, upcast)


@pytest.mark.parametrize("native", ["", "float32", "dot"])
def test_a_head_that_is_the_embedding_too_gives_its_rows(
    monkeypatch: pytest.MonkeyPatch, native: Native
) -> None:
    if native and not all_kernels():
        pytest.skip("no compiled kernels")
    monkeypatch.setattr(
        "worker.platforms.cpu.probe_linears", lambda dtype: LinearKernels(True, upcast=True, native=native)
    )
    platform = CpuPlatform()
    dtype = torch.bfloat16 if native else PACKED
    embedding = torch.randn(70, 40).to(dtype)
    head, rows = platform.pack_tied(embedding)
    assert isinstance(head, NativeLinear if native else InvariantLinear)
    ids = torch.tensor([69, 0, 33, 33], dtype=torch.int32)
    assert torch.equal(rows(ids), embedding[ids])
    x = torch.randn(3, 40).to(dtype)
    torch.testing.assert_close(head(x), x @ embedding.T, **TOLERANCE[dtype])
    assert platform.wide_rows == (None if native else UpcastingLinear.MIN_ROWS)
    assert ("compiled here" in platform.describe()) == bool(native)


def test_a_missing_packed_kernel_falls_back_to_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> PackedLinear:
        raise RuntimeError("no oneDNN in this build")

    monkeypatch.setattr("worker.platforms.cpu_kernels.PackedLinear", refuse)
    monkeypatch.setattr("worker.platforms.cpu_kernels.kernels", lambda: None)
    platform = CpuPlatform()
    linear = platform.pack_linear(torch.eye(3), None)
    assert torch.equal(linear(torch.ones(1, 3)), torch.ones(1, 3))
    assert "plain" in platform.describe()


@pytest.mark.parametrize("packed", [True, False])
def test_P13_a_replaced_worker_computes_as_the_one_before(
    monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    """A probe measures time, and may find another answer on another day."""
    first, second = CpuPlatform(), CpuPlatform()
    found = LinearKernels(packed, upcast=False)
    monkeypatch.setattr("worker.platforms.cpu.probe_linears", lambda dtype: found)
    first.pack_linear(torch.ones(8, 8, dtype=PACKED), None)
    monkeypatch.setattr("worker.platforms.cpu.probe_linears", lambda dtype: pytest.fail("probed again"))
    second.adopt(first.findings())
    second.pack_linear(torch.ones(8, 8, dtype=PACKED), None)
    assert second.describe() == first.describe() and str(found) in second.describe()
