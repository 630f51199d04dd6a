"""A decoder layer by layer on deviceType npu, operators without arithmetic: how many kernels are launched.

Run by test_levels.py in a process of its own. Tokens mean nothing here; the chip would see every launch.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from npu_stand_in.loading import launches

from engine.plan import StepKind
from tests.npu_sim.decoders import Decoder, prompt, write_decoder

LAYERS = 8  # more than any kernel is launched outside of the layers
# four products, two norms, rotation, cache write, attention, activation, and values laid out densely;
# heads whose size is no multiple of 32 have queries and keys rotated one after the other
MOST_PER_LAYER = {"llama": 11, "llama-narrow": 12}


@pytest.mark.parametrize("name", MOST_PER_LAYER)
def test_a_decode_layer_launches_no_more_than_it_has_work(name: str, tmp_path: Path) -> None:
    write_decoder(tmp_path, name, torch.bfloat16, num_hidden_layers=LAYERS)
    decoder = Decoder(tmp_path, "npu")
    for rows in (1, 3):
        per_layer = {kernel: count // LAYERS for kernel, count in launched(decoder, rows).items()}
        assert sum(per_layer.values()) <= MOST_PER_LAYER[name], per_layer
        # a fusion that is lost shows by name, and so does a test that counts nothing
        assert per_layer["aclnnMatmul"] == 4 and per_layer["aclnnAddRmsNorm"] >= 1
        assert per_layer["aclnnScatterPaKvCache"] == per_layer["aclnnSwiGlu"] == 1
        assert sum(n for kernel, n in per_layer.items() if kernel.startswith("aclnnFusedInfer")) == 1


def launched(decoder: Decoder, rows: int) -> Counter[str]:
    """Kernels of one decode step."""
    sequences = [decoder.sequence(prompt(20 + row)) for row in range(rows)]
    decoder.step(StepKind.PREFILL, sequences)
    for sequence in sequences:
        sequence.append(5)
    before = Counter(launches())
    decoder.step(StepKind.DECODE, sequences)
    return Counter(launches()) - before
