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
from scripts.write_random_model import Experts, Latent, Shape, write_model
from tests.lora_adapters import write_adapter
from tests.worker.conftest import BLOCK_SIZE, MODEL, NUM_BLOCKS, SCHEDULE
from tests.worker.ranks import on_ranks
from worker.config_values import ConfigValues
from worker.hf_config import ExpertsConfig
from worker.layers.moe import RoutedExperts, Router
from worker.layers.row_ops import TorchRowOps
from worker.loader import Checkpoint
from worker.models.configs import parse_qwen3_moe
from worker.models.sparse import Qwen3MoeForCausalLM
from worker.models.weight_reader import WeightReader
from worker.parallel import Alone, ParallelGroup
from worker.platforms.cpu import CpuPlatform
from worker.prompt_logprobs import PromptHeads, PromptLogprobs
from worker.runner import ModelRunner

VOCAB = 600
FAMILIES = {
    # heads of keys and values: a half and, with four ranks, a whole one each of two neighbours
    "tied": Shape("qwen2", layers=2, hidden=64, heads=4, kv_heads=2, intermediate=96, vocab=VOCAB, tied=True),
    "own-head": Shape(
        "llama", layers=2, hidden=96, heads=4, kv_heads=4, intermediate=64, vocab=400, tied=False
    ),
    "mixtral": Shape("mixtral", 2, 64, 4, 2, 48, 400, tied=False, experts=Experts(4, 2, 48)),
    # experts of a width that four ranks do not divide
    "qwen3-moe": Shape(
        "qwen3_moe", 2, 64, 4, 4, 96, 400, tied=False, eps=1e-6, head_size=16, experts=Experts(8, 2, 42)
    ),
    "deepseek-v3": Shape(
        "deepseek_v3",
        *(3, 64, 4, 4, 96, 400),
        tied=False,
        experts=Experts(8, 3, 32, dense=1, shared=2, groups=4, groups_per_token=2),
        latent=Latent(48, 32, 16, 16, 16),
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
    texts = home / "texts"
    texts.write_text("\n".join(f"{number} of so many words" for number in range(40)))
    for scheme in ("w8a16", "w8a8", "w8a8_dynamic"):
        arguments = ["--model", str(home / "tied"), "--out", str(home / scheme), "--scheme", scheme]
        assert quantize.main([*arguments, *(("--calibrate", str(texts)) if scheme == "w8a8" else ())]) == 0
    write_adapter(home / "tied", home / "adapter", rank=4, strength=0.7, seed=1)
    return {path.name: path for path in home.iterdir()}


@pytest.fixture(scope="module")
def platform() -> CpuPlatform:
    """Measures its kernels once for all ranks."""
    platform = CpuPlatform()
    platform.choose_kernels(torch.float32)
    return platform


def run_of(
    settings: ModelSettings, reproducible: bool = False
) -> Callable[[ParallelGroup], list[torch.Tensor]]:
    """Some steps: prompts, two of them in two pieces, then tokens; logits and scores, at last the sizes."""

    def work(group: ParallelGroup) -> list[torch.Tensor]:
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


@pytest.mark.parametrize(
    ("name", "size"), [("tied", 2), ("tied", 4), ("own-head", 2), ("w8a16", 2), ("w8a8", 2)]
)
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


def all_logits(folder: Path, size: int) -> torch.Tensor:
    found = on_ranks(size, run_of(replace(MODEL, weight_path=folder)))[0]
    return torch.cat([tensor for tensor in found if tensor.dim() == 2 and tensor.shape[1] == VOCAB])


def test_activations_in_int8_are_divided_with_their_constants(folders: dict[str, Path]) -> None:
    """Sums in another order may round one input of thousands to the next whole number, and no more."""
    whole, divided = (all_logits(folders["w8a8"], size) for size in (1, 2))
    assert ((divided - whole).norm(dim=1) < 0.01 * whole.norm(dim=1)).all()


def test_ranks_scale_their_own_inputs_no_worse(folders: dict[str, Path]) -> None:
    """Where a layer's inputs are divided, each rank scales its part by itself: not the same, but as near."""
    exact = all_logits(folders["tied"], 1)
    whole, divided = (all_logits(folders["w8a8_dynamic"], size) - exact for size in (1, 2))
    assert 0 < divided.norm() < 1.2 * whole.norm()


@pytest.mark.parametrize(
    ("name", "size", "moe_ep"),
    [
        ("mixtral", 2, 2),
        ("qwen3-moe", 2, 1),
        ("qwen3-moe", 4, 2),
        ("qwen3-moe", 4, 4),
        ("deepseek-v3", 2, 2),
        ("deepseek-v3", 4, 2),
    ],
)
def test_experts_are_dealt_to_ranks(folders: dict[str, Path], name: str, size: int, moe_ep: int) -> None:
    settings = replace(MODEL, weight_path=folders[name])
    *whole, _ = run_of(settings)(Alone())
    *leader, _ = on_ranks(size, run_of(settings), moe_ep)[0]
    for ours, theirs in zip(leader, whole, strict=True):
        torch.testing.assert_close(ours, theirs, **TOLERANCE)


def test_experts_that_no_token_goes_to_contribute_nothing() -> None:
    """One token, two of eight experts: at least two of four groups have nothing to do."""
    torch.manual_seed(3)
    router = torch.nn.Linear(16, 8, bias=False)
    experts = [(torch.nn.Linear(16, 24), torch.nn.Linear(12, 16)) for _ in range(8)]
    config = ExpertsConfig(num_experts=8, per_token=2, intermediate_size=12)

    def routed(first: int, last: int) -> RoutedExperts:
        return RoutedExperts(Router(config, router, None), experts[first:last], TorchRowOps(), first=first)

    with torch.inference_mode():
        for token in torch.randn(6, 1, 16):
            chosen = set((Router(config, router, None)(token)[1] // 2).flatten().tolist())
            parts = [routed(first, first + 2)(token) for first in (0, 2, 4, 6)]
            assert {number for number, part in enumerate(parts) if part.any()} == chosen
            torch.testing.assert_close(sum(parts), routed(0, 8)(token))


def test_a_rank_reads_no_experts_but_its_own(folders: dict[str, Path], platform: CpuPlatform) -> None:
    class Noting(Checkpoint):
        def __init__(self, folder: Path) -> None:
            super().__init__(folder)
            self.read: set[tuple[str, tuple[int, ...]]] = set()

        def _tensor(self, name: str) -> torch.Tensor:
            tensor = super()._tensor(name)
            self.read.add((name, tuple(tensor.shape)))
            return tensor

    def work(group: ParallelGroup) -> set[tuple[str, tuple[int, ...]]]:
        folder = folders["qwen3-moe"]
        config = parse_qwen3_moe(ConfigValues.read(folder / "config.json"))
        checkpoint = Noting(folder)
        Qwen3MoeForCausalLM(config, checkpoint, platform, torch.float32, 64, lambda part: None, group)
        return {(name, shape) for name, shape in checkpoint.read if ".experts." in name}

    parts = on_ranks(4, work, moe_ep=2)
    shapes = {"gate_proj": (21, 64), "up_proj": (21, 64), "down_proj": (64, 21)}
    for rank, read in enumerate(parts):
        own = range(4) if rank < 2 else range(4, 8)
        assert read == {
            (f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight", shape)
            for layer in range(2)
            for expert in own
            for name, shape in shapes.items()
        }


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


def test_a_rank_reads_its_part_of_the_files(folders: dict[str, Path], platform: CpuPlatform) -> None:
    def work(group: ParallelGroup) -> dict[str, tuple[int, ...]]:
        checkpoint = Checkpoint(folders["own-head"])
        reader = WeightReader(checkpoint, platform, torch.float32, group)
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
