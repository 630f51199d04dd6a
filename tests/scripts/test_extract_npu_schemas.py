"""Schemas out of a wheel: found among whatever else a library holds, and missed when they are not there."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from scripts.extract_npu_schemas import MissingOperators, schemas, version_of

SCHEMA = "npu_scale(Tensor x, *, Tensor(a!) out, float factor=1.0, int[2] size=[1, 1]) -> Tensor(a!)"


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    strings = [
        "npu::npu_other(Tensor x) -> ()",
        "expected npu_scale(Tensor x) but got (nothing) -> stop",
        SCHEMA,
        "atb::npu_hidden(Tensor x) -> Tensor",
        "npu_other.out(Tensor x, *, Tensor(a!) out) -> Tensor(a!)",
    ]
    file = tmp_path / "torch_npu-2.13.0-cp311-cp311-linux_x86_64.whl"
    with zipfile.ZipFile(file, "w") as archive:
        text = b"\x7fELF\1\2" + b"\0".join([b"", *(string.encode() for string in strings), b""]) + b"\3\4"
        archive.writestr("torch_npu/lib/libtorch_npu.so", text)
    return file


def test_schemas_are_found_by_name_and_overload(wheel: Path) -> None:
    assert schemas(wheel, ("npu_scale", "npu_other.out", "npu_other")) == {
        "npu_other": "npu::npu_other(Tensor x) -> ()",
        "npu_other.out": "npu::npu_other.out(Tensor x, *, Tensor(a!) out) -> Tensor(a!)",
        "npu_scale": f"npu::{SCHEMA}",
    }
    assert version_of(wheel) == "2.13.0"


def test_what_is_missing_is_named(wheel: Path) -> None:
    with pytest.raises(MissingOperators, match=r"torch_npu-2.13.0.* no schema for npu_hidden, npu_later"):
        schemas(wheel, ("npu_later", "npu_scale", "npu_hidden"))
