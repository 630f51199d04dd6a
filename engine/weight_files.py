"""The safetensors files of a model directory: which there are, and whether their headers can be true.

A model directory is downloaded from elsewhere, so nothing in it is believed: every number of a header is held
against the size of its file before anything is mapped into memory. Only headers are read, so that a directory
of any size is judged at once, by the parent too, which has no torch.
"""

from __future__ import annotations

import difflib
import json
import math
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_QUANTISED = "quant_model_weight"  # how the files of quantised checkpoints are named; more may follow

_LENGTH_BYTES = 8  # little-endian, before the header
_MAX_HEADER_BYTES = 32 * 2**20  # a tensor takes some 120 bytes of header
_MAX_INDEX_BYTES = 64 * 2**20
_MAX_DIMENSIONS = 16
_MAX_FAULTS = 10  # of one file
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16,
    "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One entry of a header."""

    file: Path
    dtype: str  # as safetensors names it
    shape: tuple[int, ...]
    begin: int  # byte offsets behind the header
    end: int


class WeightFault(Exception):
    """What is wrong with one file, in a line each."""

    def __init__(self, faults: Iterable[str]) -> None:
        self.faults = tuple(faults)
        super().__init__("; ".join(self.faults))


def read_weights(folder: Path) -> dict[str, StoredTensor]:
    """Tensor name -> where it lies, of the whole checkpoint. Raises WeightFault with all there is to say."""
    index = weight_file(folder, INDEX)
    if index is not None:
        return _read_shards(index)
    single = weight_file(folder, SINGLE)
    if single is None:
        raise WeightFault([_no_weights(folder)])
    return read_header(single)


def weight_file(folder: Path, name: str) -> Path | None:
    """The file `name`, INDEX or SINGLE, or what a quantised checkpoint has in its place; None: neither."""
    if (folder / name).exists():
        return folder / name
    found = sorted(folder.glob(f"{_QUANTISED}*{name.removeprefix('model')}"))
    if len(found) > 1:
        names = ", ".join(file.name for file in found[:3])
        raise WeightFault([f"{folder}: {len(found)} checkpoints ({names}); keep the one to be loaded"])
    return found[0] if found else None


def _no_weights(folder: Path) -> str:
    names = sorted(path.name for path in folder.glob("*.safetensors*"))
    return f"{folder} holds neither {SINGLE} nor {INDEX}" + did_you_mean(SINGLE, names)


def did_you_mean(name: str, others: Iterable[str]) -> str:
    """A hint to paste behind "no such file"; empty when nothing is near."""
    close = difflib.get_close_matches(name, list(others), 1, 0.7)
    return f" (there is {close[0]})" if close else ""


def _read_shards(index: Path) -> dict[str, StoredTensor]:
    folder = index.parent
    file_of = _read_index(index)
    faults: list[str] = []
    found: dict[str, dict[str, StoredTensor]] = {}
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    for file in sorted(set(file_of.values())):
        if not (folder / file).exists():
            others = [name for name in names if name not in file_of.values()]
            faults.append(f"{index} names a missing file: {file}{did_you_mean(file, others)}")
            continue
        try:
            found[file] = read_header(folder / file)
        except WeightFault as fault:
            faults += fault.faults
    lacking = [(name, file) for name, file in file_of.items() if file in found and name not in found[file]]
    faults += [
        f"{folder / file} lacks {name}, which {index.name} places there"
        for name, file in lacking[:_MAX_FAULTS]
    ]
    if faults:
        raise WeightFault(faults)
    return {name: found[file][name] for name, file in file_of.items()}


def _read_index(file: Path) -> dict[str, str]:
    """Tensor name -> name of its file, which lies in the same directory."""
    index = read_json_object(file, _MAX_INDEX_BYTES)
    files = index.get("weight_map")
    if not isinstance(files, dict) or not files:
        raise WeightFault([f"{file}: weight_map must be an object of tensor names and their files"])
    for name, place in files.items():
        if not isinstance(place, str) or not place or "/" in place or "\0" in place:
            raise WeightFault(
                [f"{file}: weight_map.{name} must be the name of a file beside it, found {place!r:.80}"]
            )
    return files


def _size_of(file: Path) -> int:
    """Of a file that can be read to its end: a pipe under its name would be waited for. Raises OSError."""
    info = file.stat()
    if not stat.S_ISREG(info.st_mode):
        raise WeightFault([f"{file} is not a regular file"])
    return info.st_size


def read_json_object(file: Path, most_bytes: int) -> dict[str, Any]:
    """Raises WeightFault with the file, what was expected and what is there."""
    try:
        size = _size_of(file)
        if size > most_bytes:
            raise WeightFault([f"{file} has {size} bytes; at most {most_bytes} are read"])
        value = json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise WeightFault([f"cannot read {file}: {error.strerror}"]) from None
    except (ValueError, RecursionError) as error:
        raise WeightFault([f"{file} cannot be read as JSON: {_first_line(error)}"]) from None
    if not isinstance(value, dict):
        raise WeightFault([f"{file} must hold a JSON object"])
    return value


def read_header(file: Path) -> dict[str, StoredTensor]:
    """What a file says it holds, held against what it can hold. Raises WeightFault."""
    try:
        size = _size_of(file)
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
            room = size - _LENGTH_BYTES
            if room < 2:
                raise WeightFault([f"{file} has {size} bytes, too few for a safetensors header"])
            if length > min(room, _MAX_HEADER_BYTES):
                allowed = f"at most {min(room, _MAX_HEADER_BYTES)} of its {size} bytes"
                raise WeightFault(
                    [f"{file}: a header of {length} bytes, expected {allowed}; no safetensors file, or cut"]
                )
            header = stream.read(length)
    except OSError as error:
        raise WeightFault([f"cannot read {file}: {error.strerror}"]) from None
    try:
        entries = json.loads(header.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise WeightFault([f"{file}: its header is not valid JSON: {_first_line(error)}"]) from None
    if not isinstance(entries, dict):
        raise WeightFault([f"{file}: its header must be a JSON object"])
    entries.pop("__metadata__", None)
    return _checked(file, entries, room - length)


def _checked(file: Path, entries: Mapping[str, Any], data_bytes: int) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    faults: list[str] = []
    for name, entry in entries.items():
        wrong = _entry_fault(entry)
        if wrong:
            faults.append(f"{file}: {name}: {wrong}")
        else:
            tensors[name] = StoredTensor(file, entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"])
    if not faults:
        faults = _layout_faults(file, tensors, data_bytes)
    if faults:
        more = [f"{file}: and {len(faults) - _MAX_FAULTS} more"] if len(faults) > _MAX_FAULTS else []
        raise WeightFault([*faults[:_MAX_FAULTS], *more])
    return tensors


def _entry_fault(entry: Any) -> str:
    """What one entry contradicts by itself; empty when nothing."""
    if not isinstance(entry, dict):
        return "its entry must be an object"
    dtype, shape, offsets = entry.get("dtype"), _sizes(entry.get("shape")), _sizes(entry.get("data_offsets"))
    if not isinstance(dtype, str) or dtype not in _BITS:
        return f"dtype {dtype!r:.40} is none of {', '.join(_BITS)}"
    if shape is None or len(shape) > _MAX_DIMENSIONS:
        return f"shape {entry.get('shape')!r:.80} must be a list of whole numbers, at most {_MAX_DIMENSIONS}"
    if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        return f"data_offsets {entry.get('data_offsets')!r:.80} must be [begin, end]"
    needed, given = math.prod(shape) * _BITS[dtype] // 8, offsets[1] - offsets[0]
    if needed != given:
        return f"data_offsets {offsets} hold {given} bytes, expected {needed} for {dtype} {shape}"
    return ""


def _sizes(value: Any) -> list[int] | None:
    """The value, if it is a list of sizes as the format's 64-bit numbers can be."""
    fits = isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)
    return value if fits else None


def _layout_faults(file: Path, tensors: Mapping[str, StoredTensor], data_bytes: int) -> list[str]:
    """The format leaves no byte without an owner and none with two."""
    faults = []
    reached, before = 0, ""
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin < reached:
            faults.append(
                f"{file}: {before} and {name} overlap: one ends at {reached}, one begins at {tensor.begin}"
            )
        elif tensor.begin > reached:
            faults.append(f"{file}: bytes {reached} to {tensor.begin}, before {name}, belong to no tensor")
        reached, before = max(reached, tensor.end), name
    if reached != data_bytes:
        what = "cut short, or not copied to its end" if reached > data_bytes else "something was added behind"
        faults.append(f"{file}: {data_bytes} bytes of weights, expected {reached} by its header; {what}")
    return faults


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
