"""Experts, divided or dealt, and latent attention divided among ranks: two real ranks say what one says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.plan import StepKind
from tests.worker import conftest
from tests.worker.conftest import Harness, write_checkpoint
from worker.shard import Shard

REPO = Path(__file__).resolve().parents[2]
# name -> groups of ranks that experts are dealt to
MOE_EP = {"mixtral": 1, "qwen3-moe": 2, "deepseek-v2-lite": 1, "deepseek-v3": 2}
TEXTS = (list(range(3, 40)), [7], list(range(90, 110)))
# float32: the same operations, sums in another order; as in test_models.py
EXACT = {"rtol": 1e-4, "atol": 1e-4}


def logits_of(harness: Harness) -> torch.Tensor:
    """Of a prefill and two decodes."""
    sequences = [harness.sequence(text) for text in TEXTS]
    steps = [harness.forward(StepKind.PREFILL, sequences)]
    for token in (11, 12):
        for sequence in sequences:
            sequence.append(token)
        steps.append(harness.forward(StepKind.DECODE, sequences))
    return torch.stack(steps)


def run_rank(home: Path, rank: int) -> None:
    """One of two ranks, in a process of its own; the first writes what it computed."""
    found = {}
    for number, (name, moe_ep) in enumerate(MOE_EP.items()):
        harness = Harness(home / name, join=(Shard(rank, 2, moe_ep), home / f"meeting-{number}"))
        found[name] = logits_of(harness)
        torch.distributed.destroy_process_group()
    if rank == 0:
        save_file(found, home / "found.safetensors")


@pytest.mark.slow
def test_two_ranks_say_what_one_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(conftest._SHAPE, "vocab_size", 200)  # half of which is a whole number
    for name in MOE_EP:
        write_checkpoint(tmp_path / name, name)
    code = "import sys; from pathlib import Path; from tests.worker.test_divided_families import run_rank; "
    code += "run_rank(Path(sys.argv[1]), int(sys.argv[2]))"
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(rank)], cwd=REPO, env=environ)
        for rank in range(2)
    ]
    try:
        assert [rank.wait(100) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    found = load_file(tmp_path / "found.safetensors")
    for name in MOE_EP:
        whole = logits_of(Harness(tmp_path / name))
        torch.testing.assert_close(found[name], whole, **EXACT)
        assert found[name].argmax(dim=-1).equal(whole.argmax(dim=-1))
