"""The generic adapter: what runs through transformers' own modules, and what is refused, in one line."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from engine.errors import EXIT_INIT, StartupError
from engine.plan import StepKind
from tests.worker.conftest import Harness

SHAPE: dict[str, Any] = {
    "vocab_size": 199,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WITHOUT_GROUPS = {key: value for key, value in SHAPE.items() if key != "num_key_value_heads"}

SERVED: dict[str, dict[str, Any]] = {
    "GPT2LMHeadModel": WITHOUT_GROUPS,  # learned positions, weights the other way round
    "OPTForCausalLM": {**WITHOUT_GROUPS, "ffn_dim": 80, "word_embed_proj_dim": 48},  # nested
    "GPTNeoXForCausalLM": WITHOUT_GROUPS,  # a part of each head is rotated
    "CohereForCausalLM": SHAPE,  # attention beside the MLP, other pairs rotated, scaled logits
    "Phi3ForCausalLM": {**SHAPE, "sliding_window": 11},  # one window in all layers
    "Qwen2MoeForCausalLM": {
        **SHAPE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48, "use_sliding_window": False,
    },
}  # fmt: skip
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "Gemma2ForCausalLM": ({**SHAPE, "head_dim": 8, "sliding_window": 4096}, "softcap"),
    "Gemma3ForCausalLM": (
        {
            **SHAPE,
            "head_dim": 8,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "window None",
    ),
    "FalconForCausalLM": (WITHOUT_GROUPS, "attention interface"),
    "MambaForCausalLM": (
        {"vocab_size": 199, "hidden_size": 48, "num_hidden_layers": 2},
        "num_attention_heads",
    ),
}


def write(folder: Path, name: str, options: dict[str, Any]) -> Any:
    """A random checkpoint of the architecture; returns the transformers model in eval mode."""
    cls = getattr(transformers, name)
    torch.manual_seed(len(name))
    model = cls(cls.config_class(**options)).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", SERVED)
def test_a_decoder_without_a_family_of_its_own_gives_the_same_logits(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = write(tmp_path, name, SERVED[name])
    with caplog.at_level(logging.WARNING, "llmmodels.generic"):
        harness = Harness(tmp_path)
    assert f"{name} runs through transformers' own modules" in caplog.text
    texts = [[5], list(range(3, 40)), list(range(100, 117))]
    sequences = [harness.sequence(text) for text in texts]
    logits = harness.forward(StepKind.PREFILL, sequences)
    for step in range(3):
        with torch.inference_mode():
            inputs = [torch.tensor([s.tokens[: s.num_tokens].tolist()]) for s in sequences]
            want = torch.stack([model(tokens).logits[0, -1] for tokens in inputs])
        torch.testing.assert_close(logits, want, rtol=1e-4, atol=1e-4)  # as in test_models.py
        for sequence in sequences:
            sequence.append(50 + step)
        logits = harness.forward(StepKind.DECODE, sequences)


@pytest.mark.parametrize("name", REFUSED)
def test_what_paged_attention_cannot_compute_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    options, reason = REFUSED[name]
    write(tmp_path, name, options)
    with pytest.raises(StartupError) as caught:
        Harness(tmp_path)
    message = str(caught.value)
    assert caught.value.exit_code == EXIT_INIT
    assert message.startswith(f"{tmp_path / 'config.json'}: ") and reason in message
    assert "\n" not in message and len(message) < 500


def test_windows_that_no_text_outgrows_do_not_matter(tmp_path: Path) -> None:
    kinds = ["sliding_attention", "full_attention"]
    write(
        tmp_path,
        "Gemma3ForCausalLM",
        {**SHAPE, "head_dim": 8, "sliding_window": 128, "layer_types": kinds},
    )
    Harness(tmp_path)


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    write(tmp_path, "GraniteForCausalLM", SHAPE)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(StartupError, match=r"missing tensors: model\.layers\.1\.mlp\.up_proj\.weight"):
        Harness(tmp_path)


def test_adapters_find_the_linear_layers_under_their_names(tmp_path: Path) -> None:
    write(tmp_path, "GraniteForCausalLM", SHAPE)
    projections = Harness(tmp_path).runner._model.projections
    names = {name.removeprefix("model.layers.1.") for name in projections if ".1." in name}
    assert names == {
        *(f"self_attn.{part}_proj" for part in "qkvo"),
        *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
    }
    assert projections["model.layers.0.self_attn.k_proj"].out_features == 16
