"""A checkpoint's safetensors files: checked as a whole first, then read tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.errors import EXIT_INIT, StartupError
from engine.quantisation import read_quantisation
from engine.weight_files import StoredTensor, WeightFault, read_weights

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip
HEAD, EMBEDDING = "lm_head", "model.embed_tokens"  # what every family calls them
_MAX_COMPLAINTS = 20  # a checkpoint of another model would fill the screen


class Checkpoint:
    """Maps files into memory only while tensors are being taken: `release` gives the pages back."""

    def __init__(self, folder: Path) -> None:
        """Reads the headers of all files, and how the weights are quantised."""
        self.folder = folder
        self._open: dict[Path, Any] = {}
        self._parts: dict[str, tuple[slice, slice]] = {}  # outputs and inputs of linear layers
        self._exits = ExitStack()
        try:
            self._stored = read_weights(folder)
            self.quantisation = read_quantisation(folder, self._stored)
        except WeightFault as fault:
            raise StartupError(str(fault), EXIT_INIT) from None

    @property
    def stored_dtype(self) -> torch.dtype:
        """The dtype most bytes of what is not quantised are in, once the checkpoint has been checked."""
        sizes: dict[str, int] = {}
        for name, tensor in self._stored.items():
            if tensor.dtype in _DTYPES and name not in self.quantisation.extras:
                sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.end - tensor.begin
        return _DTYPES[max(sizes, key=lambda name: sizes[name])]

    def read_only(self, module: str, outputs: slice | None = None, inputs: slice | None = None) -> None:
        """Of the linear layer `module`, from now on, these outputs and these inputs. None: all.

        Its weight [out, in] is cut along both, what else it has for each output along the first.
        """
        self._parts[module] = (outputs or slice(None), inputs or slice(None))

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor that is there, as it is read."""
        shape = self._stored[name].shape
        return tuple(
            len(range(*cut.indices(length))) for cut, length in zip(self.cuts(name), shape, strict=True)
        )

    def stored_shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor that is there, as the file has it."""
        return self._stored[name].shape

    def cuts(self, name: str) -> tuple[slice, ...]:
        """What of each dimension is read."""
        shape = self._stored[name].shape
        module = name.rpartition(".")[0]
        if module not in self._parts:
            return (slice(None),) * len(shape)
        outputs, inputs = self._parts[module]
        weight = self._stored[f"{module}.weight"].shape
        if shape == weight:
            return (outputs, inputs)
        first = outputs if shape[:1] == weight[:1] else slice(None)
        return (first, *(slice(None),) * (len(shape) - 1)) if shape else ()

    def check(self, expected: Mapping[str, tuple[int, ...]], ignorable: frozenset[str] = frozenset()) -> None:
        """Raise StartupError naming every tensor that is missing, unexpected, or wrong in shape or dtype.

        `expected`, `ignorable`: of the model in floating point.
        """
        complaints = []
        head, embedding = f"{HEAD}.weight", f"{EMBEDDING}.weight"
        if head not in expected and self.quantisation.type_of(HEAD) != "FLOAT":
            # tied, but quantised on its own: rows of int8 do not serve as an embedding
            expected = {**expected, head: expected[embedding]}
        for name, shape in expected.items():
            module, _, kind = name.rpartition(".")
            how = self.quantisation.type_of(module)
            if name in self._stored:
                is_int8 = kind == "weight" and how != "FLOAT"
                complaints += _misfits(
                    name, self._stored[name], shape, ("I8",) if is_int8 else tuple(_DTYPES)
                )
            elif not (kind == "bias" and how == "W8A8"):  # there it is part of quant_bias
                complaints.append(f"{name} {list(shape)} is missing")
        for name in self.quantisation.extras:
            norm = f"{name.rpartition('.')[0].removesuffix('.module')}.weight"
            if "norm" in norm and norm in expected:
                complaints += _misfits(name, self._stored[name], expected[norm], tuple(_DTYPES))
        for name in self._stored.keys() - expected.keys() - ignorable - self.quantisation.extras:
            complaints.append(f"{name} in {self._stored[name].file.name} is unexpected")
        if complaints:
            shown = "; ".join(sorted(complaints)[:_MAX_COMPLAINTS])
            more = (
                f"; and {len(complaints) - _MAX_COMPLAINTS} more" if len(complaints) > _MAX_COMPLAINTS else ""
            )
            raise StartupError(f"weights in {self.folder} do not fit the model: {shown}{more}", EXIT_INIT)

    def take(self, *names: str, dtype: torch.dtype) -> Tensor:
        """The named tensors, converted and joined along dimension 0; always a copy of the mapped pages."""
        parts = [self._tensor(name) for name in names]
        return (
            parts[0].to(dtype, copy=True)
            if len(parts) == 1
            else torch.cat([part.to(dtype) for part in parts])
        )

    def raw(self, name: str) -> Tensor:
        """A copy of one tensor in the type it is stored in."""
        return self._tensor(name).clone()

    def names(self) -> Iterable[str]:
        """Of all tensors."""
        return self._stored.keys()

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def bytes_held(self, expected: Iterable[str], float_bytes: int) -> int:
        """What these tensors, and those their quantisation adds, take when computed with in `float_bytes`."""
        quantised = (f"{module}.weight" for module in self.quantisation.types)
        names = {*expected, *quantised, *self.quantisation.extras} & self._stored.keys()
        return self.quantisation.bytes_held({name: self._stored[name] for name in names}, float_bytes)

    def release(self) -> None:
        """Unmap all files. Mapped pages count as this process's memory for as long as they are mapped."""
        self._exits.close()
        self._open.clear()

    def _tensor(self, name: str) -> Tensor:
        """As it is mapped. Raises StartupError when the file is no longer what its header was."""
        file = self._stored[name].file
        try:
            if file not in self._open:
                self._open[file] = self._exits.enter_context(safe_open(file, framework="pt"))
            if any(cut != slice(None) for cut in self.cuts(name)):
                tensor: Tensor = self._open[file].get_slice(name)[self.cuts(name)]
            else:
                tensor = self._open[file].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise StartupError(f"cannot read {name} of {file}: {error}", EXIT_INIT) from None
        return tensor


def _misfits(name: str, stored: StoredTensor, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> list[str]:
    where = f"{name} in {stored.file.name}"
    found = []
    if stored.shape != shape:
        found.append(f"{where} is {list(stored.shape)}, expected {list(shape)}")
    if stored.dtype not in dtypes:
        found.append(f"{where} is stored as {stored.dtype}, expected one of {', '.join(dtypes)}")
    return found
