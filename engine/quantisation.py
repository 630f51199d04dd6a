"""Which tensors of a checkpoint are quantised and how, as msModelSlim writes it down and MindIE reads it.

The model's config.json names the scheme ("quantize"), quant_model_description*.json the type of every tensor.
Beside an int8 weight [n, k] lie, each under the module's name:

- W8A8 (activations quantised with constants): input_scale, input_offset [1], quant_bias int32 [n] and
  deq_scale [n] = input_scale x the weight's scale. With q = round(x / input_scale + input_offset) in int8,
  y = (q w^T + quant_bias) * deq_scale; quant_bias holds the layer's bias and takes the offset's share off.
  Checkpoints of float16 models store the bits of deq_scale's float32 in an int64.
- W8A8_DYNAMIC (activations quantised row by row as they come) and W8A16 (not at all): weight_scale and
  weight_offset [n] or [n, 1]; the weight is (weight - weight_offset) * weight_scale. A bias stays as it was.

A norm that has been made to flatten outliers has a bias, <norm>.bias, or, where layers were left in floating
point, stands beside the one that these need: <norm>.module.weight and <norm>.module.bias.

"kv_cache_type": "C8" asks for keys and values in int8.

Only headers are read, without torch: the parent judges a directory as the worker does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from engine.weight_files import StoredTensor, WeightFault, read_json_object

LinearType = Literal["FLOAT", "W8A8", "W8A8_DYNAMIC", "W8A16"]

_W8A8: tuple[LinearType, ...] = ("W8A8", "W8A8_DYNAMIC")
# "quantize" of config.json -> the types its tensors may have beside FLOAT
SCHEMES: dict[str, tuple[LinearType, ...]] = {"w8a8": _W8A8, "w8a8_dynamic": _W8A8, "w8a16": ("W8A16",)}
_ALLOWED = f"allowed: {', '.join(SCHEMES)}, as the weights were made"
DESCRIPTION = "quant_model_description.json"

_FLOATS = ("F16", "BF16", "F32")
_MAX_BYTES = 64 * 2**20
_MAX_FAULTS = 10
# entries of a description that are no tensors
_KV_KEYS = ("kv_cache_type", "kv_quant_type")
_NO_TENSORS = {
    "model_quant_type", "version", "group_size", "metadata", "optional", "fa_quant_type", "reduce_quant_type",
    *_KV_KEYS,
}  # fmt: skip
_NORM_PARTS = (".module.weight", ".module.bias", ".bias")
_KV_PARTS = ("kv_cache_scale", "kv_cache_offset")


@dataclass(frozen=True, slots=True)
class _Part:
    """A tensor that comes with a quantised weight [n, k]."""

    name: str
    dtypes: tuple[str, ...]
    per_channel: bool = True  # n numbers, else one
    optional: bool = False


_CHANNEL_SCALES = (_Part("weight_scale", _FLOATS), _Part("weight_offset", _FLOATS, optional=True))
_PARTS: dict[LinearType, tuple[_Part, ...]] = {
    "W8A8": (
        _Part("input_scale", _FLOATS, per_channel=False),
        _Part("input_offset", (*_FLOATS, "I8", "I32"), per_channel=False),
        _Part("quant_bias", ("I32",)),
        _Part("deq_scale", ("F32", "I64")),
    ),
    "W8A8_DYNAMIC": _CHANNEL_SCALES,
    "W8A16": _CHANNEL_SCALES,
}


@dataclass(frozen=True, slots=True)
class Quantisation:
    """Of one checkpoint; the default is one in floating point."""

    scheme: str = ""  # "quantize" of config.json; "": nothing is quantised
    types: Mapping[str, LinearType] = field(default_factory=dict)  # module -> type; FLOAT is not listed
    int8_kv: bool = False
    extras: frozenset[str] = frozenset()  # tensors that no float model has

    def type_of(self, module: str) -> LinearType:
        return self.types.get(module, "FLOAT")

    def bytes_held(self, tensors: Mapping[str, StoredTensor], float_bytes: int) -> int:
        """What a worker keeps of `tensors` when it computes in numbers of `float_bytes`."""
        held = 0
        for name, tensor in tensors.items():
            is_int8 = name.endswith(".weight") and name.removesuffix(".weight") in self.types
            element = 1 if is_int8 else 4 if name in self.extras else float_bytes
            held += math.prod(tensor.shape) * element
        return held


def read_quantisation(folder: Path, tensors: Mapping[str, StoredTensor]) -> Quantisation:
    """How the checkpoint with these tensors is quantised. Raises WeightFault with all there is to say."""
    file = folder / "config.json"
    scheme = quantize_scheme(folder)
    int8 = sorted(name for name, tensor in tensors.items() if tensor.dtype == "I8")
    described = sorted(folder.glob("quant_model_description*.json"))
    if not scheme:
        if int8 or described:
            found = described[0].name if described else f"{len(int8)} int8 tensors ({int8[0]}, ...)"
            wrong = f'the weights are quantised ({found}), but "quantize" is missing'
            raise WeightFault([f"{file}: {wrong}; {_ALLOWED}"])
        return Quantisation()
    if not isinstance(scheme, str) or scheme.lower() not in SCHEMES:
        raise WeightFault([f'{file}: "quantize": {scheme!r:.40} is not supported by this build; {_ALLOWED}'])
    scheme = scheme.lower()
    source = _description_file(folder, scheme, described)
    description = read_json_object(source, _MAX_BYTES)
    faults = _description_faults(description, tensors, scheme)
    types = {
        name.removesuffix(".weight"): cast(LinearType, kind)
        for name, kind in description.items()
        if name.endswith(".weight") and name in tensors and kind in SCHEMES[scheme] and not _is_norm(name)
    }
    if not faults:
        if not types:
            faults.append(f'no tensor is quantised, though "quantize" is "{scheme}"')
        for module, kind in types.items():
            faults += _module_faults(module, kind, tensors)
        faults += [
            f"{module} is {types[module]}; embeddings are not" for module in types if "embed" in module
        ]
        faults += [
            f"{name} is int8, but described as {description.get(name, 'nothing')}"
            for name in int8
            if name.removesuffix(".weight") not in types and not name.endswith(".input_offset")
        ]
    int8_kv = any(description.get(key) == "C8" for key in _KV_KEYS)
    if faults:
        more = [f"{source}: and {len(faults) - _MAX_FAULTS} more"] if len(faults) > _MAX_FAULTS else []
        raise WeightFault([*(f"{source}: {fault}" for fault in faults[:_MAX_FAULTS]), *more])
    return Quantisation(scheme, types, int8_kv, _extras(types, tensors))


def quantize_scheme(folder: Path) -> Any:
    """What "quantize" of config.json holds, unchecked; None when it is not there or cannot be read.

    Whoever reads the file for more says what is wrong with it.
    """
    try:
        return read_json_object(folder / "config.json", _MAX_BYTES).get("quantize")
    except WeightFault:
        return None


def _description_file(folder: Path, scheme: str, found: list[Path]) -> Path:
    """The one without an ending, else the scheme's own, else the only one."""
    for name in (DESCRIPTION, DESCRIPTION.replace(".json", f"_{scheme}.json")):
        if folder / name in found:
            return folder / name
    if len(found) != 1:
        what = f"{len(found)} files {', '.join(file.name for file in found[:3])}" if found else "none"
        needed = f'"quantize" is "{scheme}", which needs a {DESCRIPTION} beside the weights'
        raise WeightFault([f"{folder}: {needed}; found {what}"])
    return found[0]


def _description_faults(
    description: Mapping[str, Any], tensors: Mapping[str, StoredTensor], scheme: str
) -> list[str]:
    """What the entries say that cannot be so, before any tensor is looked at."""
    faults = []
    for key in _KV_KEYS:
        if description.get(key) not in (None, "", "C8"):
            faults.append(
                f'"{key}": {description[key]!r:.40} is not supported; allowed: "C8", or no such entry'
            )
    if description.get("fa_quant_type"):
        faults.append(
            f'"fa_quant_type": {description["fa_quant_type"]!r:.40}: attention is not quantised here'
        )
    kinds = ("FLOAT", *SCHEMES[scheme])
    entries = {name: kind for name, kind in description.items() if name not in _NO_TENSORS}
    absent = [name for name in entries if name not in tensors]
    if absent:
        faults.append(f"names {_some(absent)}, which the weights do not have")
    for kind in sorted({str(kind) for kind in entries.values() if kind not in kinds and kind != "C8"}):
        names = [name for name, given in entries.items() if str(given) == kind]
        faults.append(
            f"type {kind:.40} of {_some(names)} is not supported with quantize {scheme}; "
            f"allowed: {', '.join(kinds)}"
        )
    return faults


def _module_faults(module: str, kind: LinearType, tensors: Mapping[str, StoredTensor]) -> list[str]:
    """What is wrong with a quantised weight and the tensors that belong to it."""
    weight = tensors[f"{module}.weight"]
    if weight.dtype != "I8" or len(weight.shape) != 2:
        return [f"{module}.weight is described as {kind}, but stored as {weight.dtype} {list(weight.shape)}"]
    faults = []
    rows = weight.shape[0]
    for part in _PARTS[kind]:
        name, wanted = f"{module}.{part.name}", rows if part.per_channel else 1
        tensor = tensors.get(name)
        if tensor is None:
            faults += [] if part.optional else [f"{module}.weight is {kind}, but {name} is missing"]
        elif tensor.dtype not in part.dtypes:
            faults.append(f"{name} is stored as {tensor.dtype}, expected one of {', '.join(part.dtypes)}")
        elif math.prod(tensor.shape) != wanted:
            hint = (
                "; scales of groups are not supported" if part.per_channel and len(tensor.shape) > 1 else ""
            )
            faults.append(f"{name} is {list(tensor.shape)}, expected [{wanted}]{hint}")
    return faults


def _extras(types: Mapping[str, LinearType], tensors: Mapping[str, StoredTensor]) -> frozenset[str]:
    parts = {f"{module}.{part.name}" for module, kind in types.items() for part in _PARTS[kind]}
    parts |= {name for name in tensors if name.endswith(_KV_PARTS)}
    parts |= {name for name in tensors if _is_norm(name) and name.endswith(_NORM_PARTS)}
    return frozenset(parts & tensors.keys())


def _is_norm(name: str) -> bool:
    """Norms before quantised layers are described with the layers' type, and are not quantised."""
    return "norm" in name.rpartition(".layers.")[2]


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
