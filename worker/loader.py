"""A checkpoint's safetensors files: checked as a whole first, then read tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.errors import EXIT_INIT, StartupError
from worker.config_values import ConfigValues

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip
_MAX_COMPLAINTS = 20  # a checkpoint of another model would fill the screen


class Checkpoint:
    """Maps files into memory only while tensors are being taken: `release` gives the pages back."""

    def __init__(self, folder: Path) -> None:
        """Reads the headers of all files."""
        self.folder = folder
        self._file_of = _locate(folder)
        self._open: dict[Path, Any] = {}
        self._exits = ExitStack()
        self._headers: dict[str, tuple[tuple[int, ...], str]] = {}
        for name, file in self._file_of.items():
            self._headers[name] = self._header(name, file)
        self.release()

    @property
    def stored_dtype(self) -> torch.dtype:
        """The dtype most bytes of the checkpoint are in."""
        sizes: dict[str, int] = {}
        for shape, stored in self._headers.values():
            sizes[stored] = sizes.get(stored, 0) + torch.Size(shape).numel()
        stored = max(sizes, key=lambda name: sizes[name])
        if stored not in _DTYPES:
            raise StartupError(f"{self.folder}: weights stored as {stored} are not supported", EXIT_INIT)
        return _DTYPES[stored]

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor that is there."""
        return self._headers[name][0]

    def check(self, expected: Mapping[str, tuple[int, ...]], ignorable: frozenset[str] = frozenset()) -> None:
        """Raise StartupError naming every missing, unexpected and wrong-shaped tensor with its file."""
        complaints = []
        for name, shape in expected.items():
            if name not in self._headers:
                complaints.append(f"{name} {list(shape)} is missing")
            elif self._headers[name][0] != shape:
                found = list(self._headers[name][0])
                complaints.append(f"{name} in {self._file_of[name].name} is {found}, expected {list(shape)}")
        for name in self._headers.keys() - expected.keys() - ignorable:
            complaints.append(f"{name} in {self._file_of[name].name} is unexpected")
        if complaints:
            shown = "; ".join(sorted(complaints)[:_MAX_COMPLAINTS])
            more = (
                f"; and {len(complaints) - _MAX_COMPLAINTS} more" if len(complaints) > _MAX_COMPLAINTS else ""
            )
            raise StartupError(f"weights in {self.folder} do not fit the model: {shown}{more}", EXIT_INIT)

    def take(self, *names: str, dtype: torch.dtype) -> Tensor:
        """The named tensors, converted and joined along dimension 0; always a copy of the mapped pages."""
        parts: list[Tensor] = [self._handle(self._file_of[name]).get_tensor(name) for name in names]
        return (
            parts[0].to(dtype, copy=True)
            if len(parts) == 1
            else torch.cat([part.to(dtype) for part in parts])
        )

    def release(self) -> None:
        """Unmap all files. Mapped pages count as this process's memory for as long as they are mapped."""
        self._exits.close()
        self._open.clear()

    def _handle(self, file: Path) -> Any:
        if file not in self._open:
            try:
                self._open[file] = self._exits.enter_context(safe_open(file, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise StartupError(f"cannot read {file}: {error}", EXIT_INIT) from None
        return self._open[file]

    def _header(self, name: str, file: Path) -> tuple[tuple[int, ...], str]:
        try:
            header = self._handle(file).get_slice(name)
        except SafetensorError:
            raise StartupError(f"{file} lacks {name}, which {_INDEX} places there", EXIT_INIT) from None
        return tuple(header.get_shape()), header.get_dtype()


def _locate(folder: Path) -> dict[str, Path]:
    """Tensor name -> the file that holds it."""
    if (folder / _INDEX).exists():
        files = ConfigValues.read(folder / _INDEX).section("weight_map")
        weight_map = {name: files.text(name, "") for name in files.names()}
        absent = sorted({file for file in weight_map.values() if not (folder / file).exists()})
        if absent:
            raise StartupError(f"{folder / _INDEX} names missing files: {', '.join(absent)}", EXIT_INIT)
        return {name: folder / file for name, file in weight_map.items()}
    file = folder / _SINGLE
    if not file.exists():
        raise StartupError(
            f"{folder} holds neither {_SINGLE} nor {_INDEX}; no other format is read", EXIT_INIT
        )
    try:
        with safe_open(file, framework="pt") as handle:
            return dict.fromkeys(handle.keys(), file)
    except (OSError, SafetensorError) as error:
        raise StartupError(f"cannot read {file}: {error}", EXIT_INIT) from None
