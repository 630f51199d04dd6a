"""What the generations of Ascend chips can do, by the name that the driver gives. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Generation:
    name: str
    serves: bool  # whether it has the operators that worker/attention/npu.py calls


# The descriptions of npu_scatter_pa_kv_cache and npu_fused_infer_attention_score name A2 and A3 alone.
_A3 = Generation("A3", serves=True)
_A2 = Generation("A2", serves=True)
_INFERENCE = Generation("310P", serves=False)
_FIRST = Generation("910 of the first generation", serves=False)

# Tried in this order: "Ascend910B" by itself is an old chip, "Ascend910B1" to "Ascend910B4-1" are not.
_NAMES: tuple[tuple[str, Generation], ...] = (
    (r"Ascend910_93\w*", _A3),
    (r"Ascend910B\d\w*(-\d+)?", _A2),
    (r"Ascend310P\w*", _INFERENCE),
    (r"Ascend910(A|B|ProA|ProB|PremiumA)?", _FIRST),
)

SERVED = "Ascend910B1 to Ascend910B4-1 (A2) or Ascend910_93xx (A3)"


def generation_of(chip: str) -> Generation | None:
    """Of the chip with this name; None for one that nobody has told us about."""
    return next((generation for pattern, generation in _NAMES if re.fullmatch(pattern, chip)), None)
