"""A device "npu" made of torch alone: schemas from operators.json, and what comes out of each operator.

To be installed in a process of its own: torch takes one such device, once. Beside shapes and dtypes the
functions here refuse what the operators' descriptions rule out and FakeTensorMode can see.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

TABLE = Path(__file__).with_name("operators.json")

_held: list[torch.library.Library] = []  # a library's operators go with it


def install() -> None:
    """Register device and operators with this process's torch."""
    _setup_privateuseone_for_python_backend("npu")
    library = torch.library.Library("npu", "DEF")
    for schema in json.loads(TABLE.read_text(encoding="utf-8"))["schemas"].values():
        library.define(schema.removeprefix("npu::"))
    for function in _RESULTS:
        torch.library.register_fake(f"npu::{function.__name__}", _on_one_device(function), lib=library)
    _held.append(library)


class Launches(TorchDispatchMode):
    """Counts what would run on the device, by operator."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace in ("aten", "npu") and func.overloadpacket not in _NO_LAUNCH:
            given = {_memory(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
            made = [tensor for tensor in tree_leaves(result) if isinstance(tensor, Tensor)]
            # what a schema says of views is no help: contiguous() copies or does not
            if func._schema.is_mutable or any(_memory(tensor) not in given for tensor in made):
                self.counts[str(func)] += 1
        return result


_NO_LAUNCH = {
    torch.ops.aten.empty,
    torch.ops.aten.empty_like,
    torch.ops.aten.new_empty,
    torch.ops.aten.set_,
}


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(what)


def _on_one_device(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        devices = {tensor.device for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        _require({device.type for device in devices} == {"npu"} and len(devices) == 1, f"device {devices}")
        return function(*args, **kwargs)

    return checked


def _is_half(*tensors: Tensor) -> bool:
    return len({tensor.dtype for tensor in tensors}) == 1 and tensors[0].dtype in (
        torch.float16,
        torch.bfloat16,
    )


def npu_rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    _require(input.shape[-1:] == gamma.shape, f"gamma {gamma.shape} for rows of {input.shape[-1]}")
    return torch.empty_like(input), input.new_empty((*input.shape[:-1], 1), dtype=torch.float32)


def npu_add_rms_norm(
    x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    _require(x1.shape == x2.shape and x1.dtype == x2.dtype, f"{x1.shape} {x1.dtype} + {x2.shape} {x2.dtype}")
    return *npu_rms_norm(x1, gamma), torch.empty_like(x1)


def npu_rotary_mul(
    input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None
) -> Tensor:
    batch, tokens, heads, dim = input.shape
    _require(r1.shape == r2.shape == (batch, tokens, 1, dim), f"{input.shape} rotated by {r1.shape}")
    _require(heads < 1000 and dim < 896 and dim % 2 == 0, f"{heads} heads of {dim}")
    return torch.empty_like(input, memory_format=torch.contiguous_format)


def npu_mrope(
    positions: Tensor,
    query: Tensor,
    key: Tensor,
    cos_sin_cache: Tensor,
    head_size: int,
    *,
    mrope_section: Sequence[int] | None = None,
    rotary_mode: str | None = "half",
    cache_mode: str | None = "default",
) -> tuple[Tensor, Tensor]:
    _require(
        query.dim() == key.dim() == cos_sin_cache.dim() == 2, "queries, keys and table have 2 dimensions"
    )
    _require(
        positions.shape == query.shape[:1] == key.shape[:1], f"{positions.shape} {query.shape} {key.shape}"
    )
    _require(query.shape[1] % head_size == key.shape[1] % head_size == 0, f"heads of {head_size}")
    _require(cos_sin_cache.shape[1] % 32 == 0, f"{cos_sin_cache.shape[1]} rotated dimensions")
    _require(not any(mrope_section or ()), "sections are for images")
    return query.new_empty(query.shape), key.new_empty(key.shape)


def npu_swiglu(input: Tensor, dim: int = -1) -> Tensor:
    _require(dim == -1 and input.shape[-1] % 2 == 0, f"halves of {input.shape}")
    return input.new_empty((*input.shape[:-1], input.shape[-1] // 2))


def npu_scatter_pa_kv_cache(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    compress_lens: Tensor | None = None,
    compress_seq_offsets: Tensor | None = None,
    seq_lens: Tensor | None = None,
    cache_mode: str | None = "PA_NZ",
) -> None:
    _require(cache_mode == "Norm", f"cache_mode {cache_mode}: our cache is not in tiles")
    tensors = (key, value, key_cache, value_cache)
    _require(all(tensor.is_contiguous() for tensor in tensors), "what is stored, and where, must be dense")
    _require(len({tensor.dtype for tensor in tensors}) == 1, "cache and what is stored must be of one dtype")
    for fresh, cache in ((key, key_cache), (value, value_cache)):
        _require(cache.dim() == 4 and fresh.shape[1:] == cache.shape[2:], f"{fresh.shape} into {cache.shape}")
    _require(slot_mapping.shape == key.shape[:1], f"{slot_mapping.shape} slots for {key.shape[0]} tokens")
    _require(slot_mapping.dtype in (torch.int32, torch.int64), f"slots are {slot_mapping.dtype}")


def npu_fused_infer_attention_score(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    atten_mask: Tensor | None = None,
    actual_seq_lengths: Sequence[int] | None = None,
    actual_seq_lengths_kv: Sequence[int] | None = None,
    block_table: Tensor | None = None,
    num_heads: int = 1,
    scale: float = 1.0,
    pre_tokens: int = 2147483647,
    next_tokens: int = 2147483647,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    sparse_mode: int = 0,
    block_size: int = 0,
    **others: Any,
) -> tuple[Tensor, Tensor]:
    _require(not any(value is not None and value not in (0, False) for value in others.values()), f"{others}")
    _require(_is_half(query, key, value), f"{query.dtype} over {key.dtype}")
    _require(query.is_contiguous() and key.is_contiguous() and value.is_contiguous(), "all must be dense")
    assert block_table is not None and actual_seq_lengths_kv is not None, "our cache is paged"
    rows, width = block_table.shape
    _require(block_table.dtype is torch.int32, f"the table is {block_table.dtype}")
    _require(
        block_size % 128 == 0 and key.shape[1] == block_size, f"{block_size} of blocks of {key.shape[1]}"
    )
    _require(len(actual_seq_lengths_kv) == rows, f"{len(actual_seq_lengths_kv)} lengths for {rows} rows")
    # lengths, not running totals: each must fit its own row of the table
    _require(
        all(0 < length <= width * block_size for length in actual_seq_lengths_kv), "a length beyond its row"
    )
    if input_layout == "TND":
        tokens, heads, dim = query.shape
        _require(heads == num_heads, f"{heads} heads, {num_heads} named")
        assert actual_seq_lengths is not None, "TND needs where rows end"
        ends = list(actual_seq_lengths)
        _require(
            ends == sorted(ends) and len(ends) == rows and ends[-1] == tokens, f"{ends} for {tokens} tokens"
        )
    else:
        _require(input_layout == "BSH", input_layout)
        batch, tokens, hidden = query.shape
        _require(batch == rows and tokens == 1, f"{query.shape} for {rows} rows")
        dim = hidden // num_heads
    _require(key.shape[2] == num_key_value_heads * dim, f"keys of {key.shape[2]}")
    if sparse_mode:
        _require(sparse_mode in (3, 4) and atten_mask is not None, f"sparse_mode {sparse_mode}")
        assert atten_mask is not None
        _require(atten_mask.shape == (2048, 2048), f"mask {atten_mask.shape}")
    return torch.empty_like(query), query.new_empty((1,), dtype=torch.float32)


def npu_quantize(
    input: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    dtype: int,
    axis: int = 1,
    div_mode: bool = True,
) -> Tensor:
    _require(not div_mode and axis == -1, "the form with factors, along rows")
    assert zero_points is not None
    _require(scales.shape == zero_points.shape == input.shape[-1:], f"{scales.shape} for {input.shape}")
    _require(scales.dtype == zero_points.dtype == input.dtype, f"{scales.dtype} for {input.dtype}")
    return input.new_empty(input.shape, dtype=torch.int8)


def npu_dynamic_quant(input: Tensor, **others: Any) -> tuple[Tensor, Tensor]:
    _require(_is_half(input), f"{input.dtype}")
    return input.new_empty(input.shape, dtype=torch.int8), input.new_empty(
        input.shape[:-1], dtype=torch.float32
    )


def npu_quant_matmul(
    x1: Tensor,
    x2: Tensor,
    scale: Tensor,
    *,
    pertoken_scale: Tensor | None = None,
    bias: Tensor | None = None,
    output_dtype: int | None = None,
    **others: Any,
) -> Tensor:
    _require(x1.dtype is x2.dtype is torch.int8, f"{x1.dtype} by {x2.dtype}")
    _require(x1.shape[-1] == x2.shape[0] <= 65535 >= x2.shape[1], f"{x1.shape} by {x2.shape}")
    _require(scale.shape == x2.shape[1:] and (bias is None or bias.shape == scale.shape), f"{scale.shape}")
    assert output_dtype is not None, "without it the result is int8"
    wanted = _DTYPES[output_dtype]
    if pertoken_scale is None:
        expected = torch.int64 if wanted is torch.float16 else torch.float32
        _require(scale.dtype is expected, f"scales of {scale.dtype} for a result in {wanted}")
        _require(bias is None or bias.dtype is torch.int32, "its bias is a sum of integers")
    else:
        _require(pertoken_scale.shape == x1.shape[:1] and pertoken_scale.dtype is torch.float32, "row scales")
        _require(bias is None or bias.dtype in (torch.float32, wanted), "bias")
    return x1.new_empty((x1.shape[0], x2.shape[1]), dtype=wanted)


def npu_weight_quant_batchmatmul(
    x: Tensor,
    weight: Tensor,
    antiquant_scale: Tensor,
    antiquant_offset: Tensor | None = None,
    quant_scale: Tensor | None = None,
    quant_offset: Tensor | None = None,
    bias: Tensor | None = None,
    **others: Any,
) -> Tensor:
    _require(x.shape[-1] == weight.shape[0], f"{x.shape} by {weight.shape}")
    _require(
        weight.dtype is torch.int8 and _is_half(x, antiquant_scale), f"{x.dtype}, {antiquant_scale.dtype}"
    )
    _require(antiquant_offset is None or antiquant_offset.dtype is x.dtype, "offsets")
    of_bias = torch.float32 if x.dtype is torch.bfloat16 else x.dtype
    _require(bias is None or bias.dtype is of_bias, "a bias beside bfloat16 is float32")
    return x.new_empty((x.shape[0], weight.shape[1]))


def npu_format_cast(
    input: Tensor, acl_format: int, *, customize_dtype: int | None = None, input_dtype: int | None = None
) -> Tensor:
    _require(acl_format == 29 and input.is_contiguous(), f"format {acl_format}")
    return torch.empty_like(input)


def npu_trans_quant_param(scale: Tensor, offset: Tensor | None = None, round_mode: int | None = 0) -> Tensor:
    _require(scale.dtype is torch.float32, f"{scale.dtype}")
    return scale.new_empty(scale.shape, dtype=torch.int64)


def npu_top_k_top_p(logits: Tensor, p: Tensor | None = None, k: Tensor | None = None) -> Tensor:
    _require(p is None or (p.shape == logits.shape[:1] and p.dtype is logits.dtype), "p of each row")
    _require(k is None or (k.shape == logits.shape[:1] and k.dtype is torch.int32), "k of each row")
    return torch.empty_like(logits)


# torch's numbers of the dtypes that arguments of type int carry
_DTYPES = {5: torch.float16, 15: torch.bfloat16, 1: torch.int8, 3: torch.int32}

_RESULTS: tuple[Callable[..., Any], ...] = (
    npu_add_rms_norm,
    npu_dynamic_quant,
    npu_format_cast,
    npu_fused_infer_attention_score,
    npu_mrope,
    npu_quant_matmul,
    npu_quantize,
    npu_rms_norm,
    npu_rotary_mul,
    npu_scatter_pa_kv_cache,
    npu_swiglu,
    npu_top_k_top_p,
    npu_trans_quant_param,
    npu_weight_quant_batchmatmul,
)
