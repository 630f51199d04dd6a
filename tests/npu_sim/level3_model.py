"""Whole decoders on deviceType npu with reference arithmetic, against the same checkpoints on the CPU.

The checkpoints are of float16. The CPU computes them in float32, so what is left between the two is what the
operators round: 11 significant bits, a dozen times a layer. Run by test_levels.py in a process of its own.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.plan import StepKind
from scripts import quantize
from scripts.write_random_model import Shape, write_model
from tests.npu_sim.decoders import FAMILIES, Decoder, prompt, write_decoder

# of the largest logit; those that follow are of order 1 to 10
CLOSE = 0.01


def assert_close(got: Tensor, want: Tensor, most: float = CLOSE) -> None:
    assert got.isfinite().all()
    assert (got - want).abs().max() <= most * want.abs().max()


Pair = tuple[Decoder, Decoder]


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """One checkpoint on the NPU and on the CPU."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    write_decoder(folder, request.param, torch.float16)
    return Decoder(folder, "npu"), Decoder(folder, "cpu")


def test_prefill_and_decode_give_the_logits_and_the_greedy_text_of_the_cpu(pair: Pair) -> None:
    npu, cpu = pair
    assert npu.runner.dtype == torch.float16 and cpu.runner.dtype == torch.float32
    texts = [prompt(150), prompt(7), prompt(128)]
    rows = {device: [device.sequence(text) for text in texts] for device in (npu, cpu)}
    kind = StepKind.PREFILL
    for _ in range(6):
        got, want = npu.step(kind, rows[npu]), cpu.step(kind, rows[cpu])
        assert_close(got, want)
        tokens = want.argmax(-1).tolist()
        assert got.argmax(-1).tolist() == tokens
        for sequences in rows.values():
            for sequence, token in zip(sequences, tokens, strict=True):
                sequence.append(token)
        kind = StepKind.DECODE


def test_a_prompt_in_chunks_beside_a_row_that_decodes(pair: Pair) -> None:
    text, other = prompt(300), prompt(20)
    last = []
    for device in pair:
        chunked, decoding = device.sequence(text[:130]), device.sequence(other)
        device.step(StepKind.PREFILL, [chunked, decoding])
        for end in (131, 256, 300):  # one token, up to the end of a block, across one
            for token in text[chunked.num_tokens : end]:
                chunked.append(token)
            decoding.append(end % 200)
            logits = device.step(StepKind.PREFILL, [chunked, decoding])
        last.append(logits)
    assert_close(*last)


@pytest.mark.parametrize("scheme", ["w8a8_dynamic", "w8a8", "w8a16"])
def test_quantised_linear_layers(scheme: str, tmp_path: Path) -> None:
    shape = Shape("qwen2", layers=2, hidden=128, heads=4, kv_heads=2, intermediate=96, vocab=600, tied=True)
    write_model(shape, tmp_path / "float", dtype="bfloat16")
    (tmp_path / "texts").write_text(" badebi dafudi gika")
    calibrate = ["--calibrate", str(tmp_path / "texts")] if scheme == "w8a8" else []
    arguments = ["--model", str(tmp_path / "float"), "--out", str(tmp_path / "int8"), "--scheme", scheme]
    assert quantize.main([*arguments, *calibrate]) == 0
    text = prompt(40)
    got, want = (
        device.step(StepKind.PREFILL, [device.sequence(text)])
        for device in (Decoder(tmp_path / "int8", "npu"), Decoder(tmp_path / "int8", "cpu"))
    )
    # both in bfloat16, of 8 significant bits; a value that rounds to the next of 256 steps takes its step too
    assert_close(got, want, most=0.05)


def test_memory_that_runs_out_is_recognised_and_comes_back(tmp_path: Path) -> None:
    write_decoder(tmp_path, "llama", torch.float16)
    decoder = Decoder(tmp_path, "npu")
    platform = decoder.runner._platform
    free = platform.memory().available
    with pytest.raises(RuntimeError) as caught:
        torch.empty(free + 2**20, dtype=torch.uint8, device=platform.device)
    assert platform.is_out_of_memory(caught.value)
    assert not platform.is_out_of_memory(RuntimeError("something else"))
    platform.give_back_memory()
    assert platform.memory().available >= free
