"""A divided model says what the whole one says, and each rank reads and keeps its part only."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.plan import StepKind, StepPlan, build_plan
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from engine.settings import LoraModule, LoraSettings, ModelSettings
from engine.step_records import decode, encode
from engine.wire.keepsake import Keepsake
from scripts import quantize
from scripts.write_random_model import Shape, write_model
from tests.lora_adapters import write_adapter
from tests.worker.conftest import BLOCK_SIZE, MODEL, NUM_BLOCKS, SCHEDULE
from tests.worker.ranks import on_ranks
from worker.parallel import Alone, ParallelGroup
from worker.prompt_logprobs import PromptHeads, PromptLogprobs
from worker.runner import ModelRunner

FAMILIES = {
    # heads of keys and values: a half and, with four ranks, a whole one each of two neighbours
    "tied": Shape("qwen2", layers=2, hidden=64, heads=4, kv_heads=2, intermediate=96, vocab=600, tied=True),
    "own-head": Shape(
        "llama", layers=2, hidden=96, heads=4, kv_heads=4, intermediate=64, vocab=400, tied=False
    ),
}
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}  # sums in another order


# kernels are chosen once for all runs of a model, as they are for all ranks of a daemon
_keepsakes: defaultdict[Path, Keepsake] = defaultdict(Keepsake)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("divided")
    for name, shape in FAMILIES.items():
        write_model(shape, home / name, dtype="float32")
    assert (
        quantize.main(["--model", str(home / "tied"), "--out", str(home / "w8a16"), "--scheme", "w8a16"]) == 0
    )
    write_adapter(home / "tied", home / "adapter", rank=4, strength=0.7, seed=1)
    return {path.name: path for path in home.iterdir()}


def run_of(
    settings: ModelSettings, reproducible: bool = False
) -> Callable[[ParallelGroup], list[torch.Tensor]]:
    """Some steps: prompts, two of them in two pieces, then tokens; logits and scores, at last the sizes."""

    def work(group: ParallelGroup) -> list[torch.Tensor]:
        torch.set_num_threads(1)
        runner = ModelRunner(
            settings, SCHEDULE, 0, lambda phase, fraction: None, keepsake=_keepsakes[settings.weight_path]
        )
        runner.group = group
        runner.load()
        runner.allocate(NUM_BLOCKS)
        loras = ("", *(module.name for module in settings.lora.modules))
        rng = np.random.default_rng(5)
        sequences = []
        for index, length in enumerate((21, 9, 33)):
            params = SamplingParams(
                max_tokens=8, lora=loras[index % len(loras)], reproducible=reproducible, prompt_logprobs=1
            )
            sequence = Sequence(index, rng.integers(0, 300, length, np.int32), params)
            sequence.block_table = list(range(8 * index, 8 * index + 8))
            sequences.append(sequence)
        found = []
        for step in range(4):
            kind = StepKind.DECODE if step > 1 else StepKind.PREFILL
            ends = [16 if step == 0 and s.num_prompt > 16 else s.num_tokens for s in sequences]
            plan = build_plan(kind, sequences, BLOCK_SIZE, ends=ends)
            if step == 1:  # the short one is done with its prompt
                plan = build_plan(kind, sequences[::2], BLOCK_SIZE)
            if group.shard.leads:
                scores = PromptLogprobs.of(plan)
                found.append(runner.forward(plan, scores))
                if scores is not None:
                    found += [torch.from_numpy(s.logprobs) for s in scores.scores.values()]
            else:
                told = decode(encode(plan))
                assert isinstance(told, StepPlan)
                found.append(runner.forward(told, PromptHeads.of(told)))
            for sequence, end in zip(sequences, ends, strict=True):
                sequence.num_computed = end
            if step >= 1:
                for sequence in sequences:
                    sequence.append(7 + step)
                    sequence.num_computed = sequence.num_tokens - 1
        found.append(torch.tensor([float(runner.weight_bytes), float(runner.block_bytes)]))
        return found

    return work


@pytest.mark.parametrize(("name", "size"), [("tied", 2), ("tied", 4), ("own-head", 2), ("w8a16", 2)])
def test_ranks_say_what_the_whole_model_says(folders: dict[str, Path], name: str, size: int) -> None:
    settings = replace(MODEL, weight_path=folders[name])
    *whole, whole_sizes = run_of(settings)(Alone())
    parts = on_ranks(size, run_of(settings))
    leader = parts[0][:-1]
    assert len(leader) == len(whole) > 6
    for ours, theirs in zip(leader, whole, strict=True):
        torch.testing.assert_close(ours, theirs, **TOLERANCE)
    for part in parts:
        weights, blocks = (part[-1] / whole_sizes).tolist()
        assert weights == pytest.approx(1 / size, rel=1e-3)
        assert blocks == max(1, FAMILIES.get(name, FAMILIES["tied"]).kv_heads // size) / (
            FAMILIES.get(name, FAMILIES["tied"]).kv_heads
        )


def test_every_rank_gets_the_same_bits_and_gets_them_again(folders: dict[str, Path]) -> None:
    settings = replace(MODEL, weight_path=folders["own-head"], dtype="bfloat16")
    first, second = (on_ranks(2, run_of(settings, reproducible=True)) for _ in range(2))
    steps = [[tensor for tensor in part[:-1] if tensor.dim() == 2] for part in (*first, *second)]
    for other in steps[1:]:
        assert all(torch.equal(a, b) for a, b in zip(steps[0], other, strict=True))


def test_adapters_are_divided_with_their_layers(folders: dict[str, Path]) -> None:
    lora = LoraSettings(modules=(LoraModule("a", folders["adapter"]),))
    settings = replace(MODEL, weight_path=folders["tied"], lora=lora)
    *whole, _ = run_of(settings)(Alone())
    *leader, _ = on_ranks(2, run_of(settings))[0]
    for ours, theirs in zip(leader, whole, strict=True):
        torch.testing.assert_close(ours, theirs, **TOLERANCE)
    *plain, _ = run_of(replace(settings, lora=LoraSettings()))(Alone())
    assert (plain[0] - whole[0]).abs().max() > 100 * TOLERANCE["atol"]  # the adapter matters


def test_a_rank_reads_its_part_of_the_files(folders: dict[str, Path]) -> None:
    from worker.loader import Checkpoint
    from worker.models.weight_reader import WeightReader
    from worker.platforms.cpu import CpuPlatform

    def work(group: ParallelGroup) -> dict[str, tuple[int, ...]]:
        checkpoint = Checkpoint(folders["own-head"])
        reader = WeightReader(checkpoint, CpuPlatform(), torch.float32, group)
        prefix = "model.layers.0."
        reader.column_parallel(prefix, "self_attn.q_proj", units=(4,))
        reader.row_parallel(prefix, "mlp.down_proj")
        reader.head("lm_head")
        names = (f"{prefix}self_attn.q_proj", f"{prefix}mlp.down_proj", "lm_head")
        taken = {name: tuple(checkpoint.raw(f"{name}.weight").shape) for name in names}
        assert taken == {name: checkpoint.shape(f"{name}.weight") for name in names}
        return taken

    for taken in on_ranks(4, work):
        assert list(taken.values()) == [(24, 96), (96, 16), (100, 96)]
