"""Adapters beside the base model and beside each other, against transformers models they are merged into."""

from __future__ import annotations

import json
import os
import select
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.errors import StartupError
from engine.plan import StepKind
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from engine.settings import LoraModule, LoraSettings
from tests.lora_adapters import edit_config, merged, write_adapter
from tests.worker.conftest import BLOCK_SIZE, MODEL, Harness
from tests.worker.test_models import EXACT, ROUNDED, expected_logits, prompts

Checkpoint = Callable[..., tuple[Path, Any]]
NAMES = ("a", "b")


class Adapted:
    """A base model, two adapters of it, and what transformers says of each."""

    def __init__(self, folder: Path, base: Any, place: Path, **settings: Any) -> None:
        self.paths = {name: place / name for name in NAMES}
        write_adapter(folder, self.paths["a"], rank=4, strength=0.7, seed=1)
        write_adapter(folder, self.paths["b"], rank=7, alpha=3.0, strength=0.7, seed=2,
                      targets=("k_proj", "o_proj", "up_proj"))  # fmt: skip
        edit_config(self.paths["b"], use_rslora=True, alpha_pattern={"layers.1.mlp.up_proj": 9.0})
        self.references = {"": base} | {name: merged(base, path) for name, path in self.paths.items()}
        modules = tuple(LoraModule(name, path) for name, path in self.paths.items())
        lora = LoraSettings(modules=modules, **settings)
        self.harness = Harness(folder, replace(MODEL, lora=lora))

    def sequence(self, prompt: list[int], lora: str) -> Sequence:
        return Sequence(0, np.array(prompt, np.int32), SamplingParams(max_tokens=64, lora=lora))

    def expected(self, sequences: list[Sequence]) -> torch.Tensor:
        return torch.stack(
            [expected_logits(self.references[s.params.lora], s.tokens[: s.num_tokens].tolist())
             for s in sequences]
        )  # fmt: skip

    def check(self, kind: StepKind, sequences: list[Sequence], tolerance: dict[str, float]) -> torch.Tensor:
        logits, want = self.harness.forward(kind, sequences), self.expected(sequences)
        torch.testing.assert_close(logits.float(), want.float(), **tolerance)
        return want


@pytest.fixture
def adapted(checkpoint: Checkpoint, tmp_path: Path) -> Adapted:
    return Adapted(*checkpoint("llama-gqa-llama3"), tmp_path)


@pytest.mark.parametrize("name", ["llama", "llama-mqa-bias-headdim", "qwen2-tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_mixed_batches_agree_with_merged_models(
    checkpoint: Checkpoint, tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    adapted = Adapted(*checkpoint(name, dtype), tmp_path)
    tolerance = EXACT if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.4}
    loras = ["", "a", "b", "a", "", "b"]
    # of different lengths: decode steps order their rows by context length
    texts = prompts(5, 37, BLOCK_SIZE, BLOCK_SIZE + 1, 60, 20)
    sequences = [adapted.sequence(text, lora) for text, lora in zip(texts, loras, strict=True)]
    kind = StepKind.PREFILL
    for step in range(4):
        want = adapted.check(kind, sequences, tolerance)
        for sequence in sequences:
            sequence.append(int(want[0].argmax() + step) % 199)
        kind = StepKind.DECODE


def test_the_adapters_of_these_tests_matter(adapted: Adapted) -> None:
    (text,) = prompts(30)
    logits = {lora: adapted.expected([adapted.sequence(text, lora)])[0] for lora in ("", *NAMES)}
    for one, other in (("", "a"), ("", "b"), ("a", "b")):
        assert (logits[one] - logits[other]).abs().max() > 20 * ROUNDED["atol"] / 4


def test_a_step_of_one_adapter_alone_and_chunks(adapted: Adapted) -> None:
    long, short = prompts(61, 9)
    chunked = adapted.sequence(long[:20], "a")
    adapted.check(StepKind.PREFILL, [chunked], EXACT)
    for token in long[20:50]:
        chunked.append(token)
    adapted.check(StepKind.PREFILL, [chunked, adapted.sequence(short, "b")], EXACT)
    for token in long[50:]:
        chunked.append(token)
    adapted.check(StepKind.PREFILL, [chunked, adapted.sequence(short, "")], EXACT)


def test_greedy_text_equals_the_merged_model(adapted: Adapted) -> None:
    texts, loras = prompts(5, 30, 17), ["a", "", "b"]
    sequences = [adapted.sequence(text, lora) for text, lora in zip(texts, loras, strict=True)]
    logits = adapted.harness.forward(StepKind.PREFILL, sequences)
    for _ in range(16):
        for row, sequence in enumerate(sequences):
            sequence.append(int(logits[row].argmax()))
        logits = adapted.harness.forward(StepKind.DECODE, sequences)
    for text, sequence in zip(texts, sequences, strict=True):
        with torch.inference_mode():
            whole = adapted.references[sequence.params.lora].generate(
                torch.tensor([text]), max_new_tokens=16, min_new_tokens=16, do_sample=False
            )
        got = sequence.output_ids.tolist()
        end = got.index(2) if 2 in got else 16  # min_new_tokens masks the end token
        assert got[:end] == whole[0, len(text) :].tolist()[:end]


def test_base_rows_are_the_same_to_the_bit_beside_an_adapter(adapted: Adapted) -> None:
    """A decode step has the same number of rows either way, so every product of the base is the same."""
    first, second = prompts(11, 11)
    alone = [adapted.sequence(first, ""), adapted.sequence(second, "")]
    mixed = [adapted.sequence(first, ""), adapted.sequence(second, "a")]
    want = adapted.harness.forward(StepKind.PREFILL, alone)
    got = adapted.harness.forward(StepKind.PREFILL, mixed)
    assert torch.equal(got[0], want[0])
    assert not torch.equal(got[1], want[1])


# -- while the server runs ---------------------------------------------------------------------------------


def load(adapted: Adapted, name: str, path: Path) -> str:
    """What a run-time load comes to."""
    table = adapted.harness.runner.adapters
    table.load(name, str(path))
    assert select.select([table.fileno()], [], [], 30.0)[0]
    ((loaded, error),) = table.take_loaded()
    assert loaded == name
    assert table.take_loaded() == [] and not select.select([table.fileno()], [], [], 0)[0]
    return error


def test_an_adapter_comes_and_goes_between_steps(adapted: Adapted) -> None:
    (text,) = prompts(12)
    table = adapted.harness.runner.adapters
    assert "c" not in table
    assert load(adapted, "c", adapted.paths["a"]) == ""
    assert "c" in table
    got = adapted.harness.forward(StepKind.PREFILL, [adapted.sequence(text, "c")])
    want = adapted.harness.forward(StepKind.PREFILL, [adapted.sequence(text, "a")])
    assert torch.equal(got, want)
    table.remove("c")
    table.remove("c")
    assert "c" not in table and "a" in table
    adapted.check(StepKind.PREFILL, [adapted.sequence(text, "a"), adapted.sequence(text, "")], EXACT)


def test_an_adapter_is_in_force_only_when_it_has_been_taken(adapted: Adapted) -> None:
    table = adapted.harness.runner.adapters
    table.load("c", str(adapted.paths["b"]))
    assert select.select([table.fileno()], [], [], 30.0)[0]
    assert "c" not in table
    table.take_loaded()
    assert "c" in table


def test_ranks_are_limited(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder, base = checkpoint("llama")
    adapted = Adapted(folder, base, tmp_path, max_loras=8, max_rank=7)
    write_adapter(folder, tmp_path / "wide", rank=8)
    error = load(adapted, "wide", tmp_path / "wide")
    assert error == f"{tmp_path}/wide/adapter_config.json: rank 8 is above maxLoraRank 7"
    assert load(adapted, "fits", adapted.paths["b"]) == ""


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = path / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
_B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"

FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no directory": (lambda p: p.rename(p.with_name("gone")), "cannot be read: No such file"),
    "no config": (lambda p: (p / "adapter_config.json").unlink(), "adapter_config.json: cannot be read"),
    "no weights": (lambda p: (p / "adapter_model.safetensors").unlink(), "safetensors: cannot be read"),
    "pipe": (
        lambda p: ((p / "adapter_config.json").unlink(), os.mkfifo(p / "adapter_config.json")),
        "is no regular file",
    ),
    "broken weights": (lambda p: (p / "adapter_model.safetensors").write_bytes(b"\0" * 40), "cannot be read"),
    "config no JSON": (lambda p: (p / "adapter_config.json").write_text("{"), "is not valid JSON"),
    "no rank": (lambda p: edit_config(p, r=None), "r must be an integer in [1, "),
    "rank text": (lambda p: edit_config(p, r="8"), "r must be an integer in [1, "),
    "no alpha": (lambda p: edit_config(p, lora_alpha=None), "lora_alpha must be a number"),
    "another method": (lambda p: edit_config(p, peft_type="IA3"), 'peft_type must be "LORA", found "IA3"'),
    "dora": (lambda p: edit_config(p, use_dora=True), "use_dora must be false"),
    "biases": (lambda p: edit_config(p, bias="all"), 'bias must be "none"'),
    "whole modules": (lambda p: edit_config(p, modules_to_save=["lm_head"]), "modules_to_save must be null"),
    "pattern": (lambda p: edit_config(p, rank_pattern={"(a+)+$": 4}), "must be a module's name"),
    "wrong rank": (lambda p: edit_config(p, r=5), "but rank and model make it [5, 48]"),
    "rank by pattern": (lambda p: edit_config(p, rank_pattern={"q_proj": 9}), "make it [9, 48]"),
    "half": (lambda p: rewrite(p, lambda t: t.pop(_B)), f"{_B} is missing"),
    "empty": (lambda p: rewrite(p, lambda t: t.clear()), "holds no tensors"),
    "stranger": (
        lambda p: rewrite(p, lambda t: t.update({"base_model.model.lm_head.lora_A.weight": t[_A].clone()})),
        "lm_head.lora_A.weight belongs to no projection",
    ),
    "layer too many": (
        lambda p: rewrite(p, lambda t: t.update({_A.replace("layers.0", "layers.3"): t[_A].clone()})),
        "layers.3.self_attn.q_proj.lora_A.weight belongs to no projection",
    ),
    "shape": (
        lambda p: rewrite(p, lambda t: t.update({_A: torch.zeros(4, 47)})),
        f"{_A} is [4, 47], but rank and model make it [4, 48]",
    ),
    "integers": (
        lambda p: rewrite(p, lambda t: t.update({_A: torch.zeros(4, 48, dtype=torch.int8)})),
        "is stored as I8",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_one_clear_line_and_changes_nothing(adapted: Adapted, fault: str) -> None:
    break_it, wanted = FAULTS[fault]
    path = adapted.paths["a"]
    break_it(path)
    error = load(adapted, "c", path)
    assert wanted in error and str(path) in error and "\n" not in error
    assert "c" not in adapted.harness.runner.adapters
    # what was loaded before goes on
    adapted.check(StepKind.PREFILL, [adapted.sequence(prompts(9)[0], "a")], EXACT)


def test_one_that_is_too_large_for_the_memory(adapted: Adapted, monkeypatch: pytest.MonkeyPatch) -> None:
    from worker.platforms.cpu import CpuPlatform
    from worker.platforms.memory_limits import MemoryInfo

    monkeypatch.setattr(CpuPlatform, "memory", lambda self: MemoryInfo(available=100, total=10**9))
    assert "of memory, but 0 MiB are free" in load(adapted, "c", adapted.paths["a"])


def test_a_static_one_that_does_not_fit_ends_the_start(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder, _ = checkpoint("llama")
    (tmp_path / "a").mkdir()
    lora = LoraSettings(modules=(LoraModule("a", tmp_path / "a"),))
    with pytest.raises(StartupError, match=r"adapter_config\.json: cannot be read"):
        Harness(folder, replace(MODEL, lora=lora))


@pytest.mark.parametrize(("policy", "refused"), [("warn", False), ("refuse", True), ("off", False)])
def test_files_that_others_may_change(
    checkpoint: Checkpoint, tmp_path: Path, policy: Any, refused: bool
) -> None:
    adapted = Adapted(*checkpoint("llama"), tmp_path, file_policy=policy)
    adapted.paths["a"].chmod(0o777)
    error = load(adapted, "c", adapted.paths["a"])
    assert ("mode 0777 is wider than 0750" in error and "chmod" in error) if refused else error == ""


def test_patterns_name_modules_or_their_ends(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Ranks by module, as PEFT writes them."""
    folder, base = checkpoint("llama")
    write_adapter(folder, tmp_path / "c", rank=4, alpha=8.0)
    module = "model.layers.1.mlp.down_proj"
    key = f"base_model.model.{module}.lora_A.weight"

    def widen(tensors: dict[str, torch.Tensor]) -> None:
        tensors[key] = torch.cat([tensors[key], tensors[key]])
        other = key.replace("lora_A", "lora_B")
        tensors[other] = torch.cat([tensors[other], tensors[other].flip(0)], dim=1)

    rewrite(tmp_path / "c", widen)
    lora = LoraSettings(modules=(LoraModule("c", tmp_path / "c"),))
    sequence = Sequence(0, np.array(prompts(9)[0], np.int32), SamplingParams(max_tokens=4, lora="c"))
    for pattern in (module, f"^{module}", "layers.1.mlp.down_proj"):
        edit_config(tmp_path / "c", rank_pattern={"other": 9, pattern: 8})
        harness = Harness(folder, replace(MODEL, lora=lora))
        sequence.num_computed, sequence.block_table = 0, []
        logits = harness.forward(StepKind.PREFILL, [sequence])
        want = expected_logits(merged(base, tmp_path / "c"), prompts(9)[0])
        torch.testing.assert_close(logits[0], want, **EXACT)
    edit_config(tmp_path / "c", rank_pattern={"^mlp.down_proj": 8})
    with pytest.raises(StartupError, match="does not fit the model"):
        Harness(folder, replace(MODEL, lora=lora))


def test_the_script_writes_what_it_says(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder, base = checkpoint("llama")
    assert write_adapter(folder, tmp_path / "c", rank=3, targets=("o_proj",)) == 3 * (3 * 2 * 48)
    assert json.loads((tmp_path / "c" / "adapter_config.json").read_text())["target_modules"] == ["o_proj"]
    change = merged(base, tmp_path / "c").model.layers[0].self_attn.o_proj.weight
    difference = (change - base.model.layers[0].self_attn.o_proj.weight).std().item()
    assert difference == pytest.approx(48**-0.5, rel=0.3)
