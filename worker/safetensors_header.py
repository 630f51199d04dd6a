"""What the header of a safetensors file tells, read without torch: sizes and types, no weights.

A file is 8 bytes of length (little endian), that many bytes of JSON, then the tensors' bytes.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import EXIT_INIT, StartupError

_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100 * 2**20  # what the safetensors library accepts


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """What a checkpoint's files hold together."""

    num_files: int
    elements: dict[str, int]  # stored type ("BF16", "F32", ...) -> number of elements

    @property
    def num_elements(self) -> int:
        return sum(self.elements.values())

    @property
    def stored_type(self) -> str:
        """The type most elements have."""
        return max(self.elements, key=lambda name: self.elements[name])


def read_weight_files(folder: Path) -> WeightFiles:
    """The headers of all *.safetensors files. StartupError names a file that is none, or is cut off."""
    elements: dict[str, int] = {}
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        for stored, count in _read_header(file):
            elements[stored] = elements.get(stored, 0) + count
    if not elements:
        raise StartupError(f"{folder} holds no tensors in *.safetensors files", EXIT_INIT)
    return WeightFiles(len(files), elements)


def _read_header(file: Path) -> list[tuple[str, int]]:
    """(stored type, number of elements) of each tensor."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
            size = file.stat().st_size
            if not 2 <= length <= min(_MAX_HEADER_BYTES, size - _LENGTH_BYTES):
                raise StartupError(f"{file}: no safetensors header ({size} bytes in all)", EXIT_INIT)
            header: Any = json.loads(stream.read(length))
        tensors = [row for name, row in header.items() if name != "__metadata__"]
        end = max((row["data_offsets"][1] for row in tensors), default=0)
        found = [(str(row["dtype"]), math.prod(row["shape"])) for row in tensors]
    except OSError as error:
        raise StartupError(f"cannot read {file}: {error.strerror}", EXIT_INIT) from None
    except (ValueError, TypeError, AttributeError, KeyError, IndexError, RecursionError):
        raise StartupError(f"{file}: its safetensors header cannot be understood", EXIT_INIT) from None
    whole = _LENGTH_BYTES + length + end
    if size != whole:
        raise StartupError(
            f"{file} has {size} bytes, its header describes {whole}: cut off or damaged; copy it again",
            EXIT_INIT,
        )
    return found
