"""Rotary position embedding (Su et al. 2021) with linear, Llama-3 and YaRN context extension."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from worker.hf_config import RopeConfig


class RotaryTable:
    """cos and sin of every position, computed in float32 and stored in the model's dtype."""

    def __init__(
        self, rope: RopeConfig, head_dim: int, num_positions: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        inv_freq, scale = inverse_frequencies(rope, head_dim)
        angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * inv_freq
        cos, sin = angles.cos() * scale, angles.sin() * scale
        # rotate-half is (-second, first): with the sign here, apply_rotary needs only a roll
        self._cos = torch.cat((cos, cos), dim=-1).to(device, dtype)
        self._sin = torch.cat((-sin, sin), dim=-1).to(device, dtype)

    def gather(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions: [T] -> cos, sin: [T, 1, head_dim]; once per step."""
        return self._cos.index_select(0, positions)[:, None], self._sin.index_select(0, positions)[:, None]


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [T, heads, head_dim], cos and sin from `RotaryTable.gather` -> rotated x, contiguous."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    """Angle per position of each dimension pair, float32 [head_dim / 2], and the factor on cos and sin."""
    period = rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    plain = 1.0 / period
    if rope.kind == "linear":
        return plain / rope.factor, 1.0
    if rope.kind == "llama3":
        return _llama3_frequencies(rope, plain), 1.0
    if rope.kind == "yarn":
        return _yarn_frequencies(rope, period), _yarn_attention_factor(rope)
    return plain, 1.0


def _llama3_frequencies(rope: RopeConfig, plain: Tensor) -> Tensor:
    """Long wavelengths are stretched by the factor, short ones kept, those between blended."""
    wavelength = 2 * math.pi / plain
    longest_kept = rope.original_max_positions / rope.high_freq_factor
    shortest_stretched = rope.original_max_positions / rope.low_freq_factor
    stretched = plain / rope.factor
    kept_share = (rope.original_max_positions / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - kept_share) * stretched + kept_share * plain
    result = torch.where(wavelength > shortest_stretched, stretched, blended)
    return torch.where(wavelength < longest_kept, plain, result)


def _yarn_frequencies(rope: RopeConfig, period: Tensor) -> Tensor:
    """Peng et al. 2023, "by parts": dimensions that turn often are kept, those that turn rarely stretched."""
    head_dim = 2 * len(period)

    def dimension(turns: float) -> float:
        """Dimension whose angle makes `turns` full turns over the original context."""
        return (
            head_dim
            * math.log(rope.original_max_positions / (turns * 2 * math.pi))
            / (2 * math.log(rope.theta))
        )

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # a step instead of a division by zero
    stretched_share = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return 1.0 / (rope.factor * period) * stretched_share + 1.0 / period * (1 - stretched_share)


def _yarn_attention_factor(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor

    def magnitude(mscale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * mscale * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
    return magnitude(1.0)
