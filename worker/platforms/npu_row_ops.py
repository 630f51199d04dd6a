"""What a decoder does to each token between its products, with the fused operators of torch_npu."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_FUSED_ROTATION = 32  # npu_mrope wants multiples of it for rotated dimensions of 16 bits


@dataclass(frozen=True, slots=True)
class _Rotation:
    """One step's cosines and sines in the forms the operators take."""

    source: Tensor  # the cosines it was made of; held, so that no other tensor can be taken for them
    table: Tensor  # [T, head_dim]: of each dimension pair the cosines, then the sines
    index: Tensor  # int64 [T]: the row of each token
    cos: Tensor  # [1, T, 1, head_dim]
    sin: Tensor  # likewise, without the sign that `RotaryTable` puts in


class NpuRowOps:
    """A decode layer is few launches: results come where, and as dense as, the next operator wants them."""

    def __init__(self) -> None:
        self._rotation: _Rotation | None = None

    def add_rms_norm(self, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        if delta is None:
            normed: Tensor = torch.ops.npu.npu_rms_norm(x, weight, epsilon=eps)[0]
            return normed
        normed, _, total = torch.ops.npu.npu_add_rms_norm(x, delta, weight, epsilon=eps)
        # "in place" for whoever holds x, without the launch that copying the sum into it would be
        x.set_(total)
        return normed

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        result: Tensor = torch.ops.npu.npu_swiglu(gate_up, dim=-1)
        return result

    def rotate(self, heads: Tensor, count: int, cos: Tensor, sin: Tensor) -> Tensor:
        rotation = self._of_step(cos, sin)
        rotated: Tensor = torch.ops.npu.npu_rotary_mul(heads[:, :count][None], rotation.cos, rotation.sin)
        return rotated[0]

    def rotate_apart(
        self, heads: Tensor, num_heads: int, num_kv_heads: int, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        both = num_heads + num_kv_heads
        head_dim = heads.shape[-1]
        if head_dim % _FUSED_ROTATION:
            keys = heads[:, num_heads:both]
            return self.rotate(heads, num_heads, cos, sin), self.rotate(keys, num_kv_heads, cos, sin)
        rotation = self._of_step(cos, sin)
        # it takes strided queries and keys and gives dense ones, which the attention wants
        q, k = torch.ops.npu.npu_mrope(
            rotation.index,
            heads[:, :num_heads].flatten(1),
            heads[:, num_heads:both].flatten(1),
            rotation.table,
            head_dim,
            mrope_section=[0, 0, 0],
            rotary_mode="half",
        )
        return q.view(-1, num_heads, head_dim), k.view(-1, num_kv_heads, head_dim)

    def _of_step(self, cos: Tensor, sin: Tensor) -> _Rotation:
        """All layers of a step are given the same tensors, so this is made once for them."""
        if self._rotation is None or self._rotation.source is not cos:
            tokens, _, head_dim = cos.shape
            plain = sin[..., head_dim // 2 :]  # the second half has no sign
            self._rotation = _Rotation(
                cos,
                torch.cat((cos[..., : head_dim // 2], plain), dim=-1)[:, 0],
                # of the step too: a captured one must not read what outside of it is given up some day
                torch.arange(tokens, device=cos.device),
                cos[None],
                torch.cat((plain, plain), dim=-1)[None],
            )
        return self._rotation
