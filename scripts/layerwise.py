"""Texts through a model, all of them through a layer before the next is read: the model need not fit."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer

from engine.plan import StepKind, StepPlan, build_plan
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence as TokenSequence
from worker.attention.base import AttentionSpec
from worker.attention.registry import make_attention
from worker.batch import make_batch
from worker.config_values import ConfigValues
from worker.kv_cache import KvCache, KvSpec
from worker.layers.norm import rms_norm
from worker.layers.rotary import RotaryTable
from worker.loader import EMBEDDING, HEAD, Checkpoint
from worker.models.llama import LlamaForCausalLM
from worker.models.registry import model_class
from worker.models.weight_reader import WeightReader
from worker.parallel import Alone
from worker.platforms.base import Linear
from worker.platforms.cpu import CpuPlatform

Ranges = dict[str, tuple[float, float]]  # module -> smallest and largest number among its inputs, 0 included
_ROWS = 64  # of logits at a time


def draw_progress(what: str, done: int, total: int, width: int = 30) -> None:
    """Redraw the bar on a terminal; print a line every tenth of the way elsewhere."""
    if sys.stderr.isatty():
        filled = width * done // total
        end = "\n" if done == total else ""
        bar = f"[{'#' * filled}{'.' * (width - filled)}]"
        print(f"\r{what} {bar} {done}/{total}", end=end, file=sys.stderr, flush=True)
    elif done == total or done % max(1, total // 10) == 0:
        print(f"{what} {done}/{total}", file=sys.stderr, flush=True)


# --- texts ---


def read_texts(model: Path, file: Path, samples: int, max_tokens: int) -> list[list[int]]:
    """Token ids of the first `samples` lines, each cut to `max_tokens`; ValueError when there is none.

    A line is a text, or a JSON object with "question" and "answer", asked in the model's chat.
    """
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    texts: list[list[int]] = []
    for line in file.read_text(encoding="utf-8").split("\n"):
        text = _as_chat(line, tokenizer) if line.startswith("{") else line
        ids = tokenizer.encode(text, add_special_tokens=False)[:max_tokens]
        if len(ids) > 1:  # a single token foretells nothing
            texts.append(ids)
        if len(texts) == samples:
            break
    if not texts:
        raise ValueError(f"{file} holds no text")
    return texts


def _as_chat(line: str, tokenizer: Any) -> str:
    record = json.loads(line)
    if not all(isinstance(record.get(key), str) for key in ("question", "answer")):
        raise ValueError(f'{line[:60]!r}: a JSON line needs the texts "question" and "answer"')
    turns = [
        {"role": "user", "content": record["question"]},
        {"role": "assistant", "content": record["answer"]},
    ]
    return str(tokenizer.apply_chat_template(turns, tokenize=False))


# --- layers ---


class Observed:
    """A layer that remembers the range of what it is given."""

    def __init__(self, inner: Linear) -> None:
        self._inner = inner
        self.range = (0.0, 0.0)

    def __call__(self, x: Tensor) -> Tensor:
        """x: [rows, in] -> [rows, out]."""
        low, high = torch.aminmax(x)
        self.range = (min(self.range[0], low.item()), max(self.range[1], high.item()))
        return self._inner(x)


class ObservingReader(WeightReader):
    """Reads layers that are observed."""

    def __init__(self, checkpoint: Checkpoint, platform: CpuPlatform, dtype: torch.dtype) -> None:
        super().__init__(checkpoint, platform, dtype, Alone())
        self.observed: dict[str, Observed] = {}

    def linear(self, prefix: str, *modules: str, bias: bool = False) -> Linear:
        layer = Observed(super().linear(prefix, *modules, bias=bias))
        self.observed.update({f"{prefix}{module}": layer for module in modules})
        return layer


def family_class(folder: Path) -> type[LlamaForCausalLM]:
    """Of a model; ValueError when its layers are not built one by one."""
    cls = model_class(ConfigValues.read(folder / "config.json"))
    if not issubclass(cls, LlamaForCausalLM):
        raise ValueError(f"{folder} has no family of its own; docs/models.md has those that can be quantised")
    return cls


def input_ranges(checkpoint: Checkpoint, texts: Sequence[list[int]]) -> Ranges:
    """What the linear layers of the decoder are given while it reads the texts."""
    found: Ranges = {}

    def note(reader: ObservingReader) -> None:
        found.update({name: layer.range for name, layer in reader.observed.items()})

    _hidden_states(checkpoint, texts, "calibrating", note)
    return found


@torch.inference_mode()
def mean_loss(checkpoint: Checkpoint, texts: Sequence[list[int]]) -> float:
    """Nats per token that the model is surprised by the texts."""
    states, reader = _hidden_states(checkpoint, texts, "checking", lambda _: None)
    values = ConfigValues.read(checkpoint.folder / "config.json")
    config = model_class(values).parse_config(values)
    norm = reader.plain("model.norm")
    has_own_head = not config.tie_word_embeddings or checkpoint.quantisation.type_of(HEAD) != "FLOAT"
    head = reader.linear("", HEAD if has_own_head else EMBEDDING)
    total, count = 0.0, 0
    for ids, hidden in zip(texts, states, strict=True):
        wanted = torch.tensor(ids[1:])
        normed = rms_norm(hidden[:-1], norm, config.rms_norm_eps)
        for rows, targets in zip(torch.split(normed, _ROWS), torch.split(wanted, _ROWS), strict=True):
            total += functional.cross_entropy(head(rows).float(), targets, reduction="sum").item()
        count += len(wanted)
    return total / count


@torch.inference_mode()
def _hidden_states(
    checkpoint: Checkpoint, texts: Sequence[list[int]], what: str, after: Callable[[ObservingReader], None]
) -> tuple[list[Tensor], ObservingReader]:
    """Of each text after the last layer, [T, hidden], and a reader for the rest.

    `after` is given each layer's reader when all texts have passed; the layer is dropped then.
    """
    cls = family_class(checkpoint.folder)
    config = cls.parse_config(ConfigValues.read(checkpoint.folder / "config.json"))
    platform = CpuPlatform()
    dtype = platform.weight_dtype("auto", checkpoint.stored_dtype)
    longest = max(map(len, texts))
    spec = AttentionSpec(config.num_heads, config.num_kv_heads, config.head_dim, dtype, window=config.window)
    attention = make_attention(platform.attention_backend(spec), spec)
    spec_of_cache = KvSpec(
        1, longest, config.num_kv_heads, config.head_dim, dtype, shared=config.shares_pages
    )
    ((k_cache, v_cache),) = KvCache(spec_of_cache, 1, platform.device).layers
    rotary = RotaryTable(config.rope, config.rotary_dim, longest, dtype, platform.device)
    batches = [make_batch(_whole(ids, longest), platform.device) for ids in texts]
    embedding = checkpoint.take(f"{EMBEDDING}.weight", dtype=dtype)
    states = [functional.embedding(batch.input_ids, embedding) for batch in batches]
    del embedding
    for index in range(config.num_layers):
        reader = ObservingReader(checkpoint, platform, dtype)
        layer = cls.make_layer(config, reader, index)
        for batch, x in zip(batches, states, strict=True):
            attention.begin_step(batch, longest)
            x += layer.forward(x, None, *rotary.gather(batch.positions), attention, k_cache, v_cache)
        after(reader)
        draw_progress(what, index + 1, config.num_layers)
    return states, ObservingReader(checkpoint, platform, dtype)


def _whole(ids: list[int], block_size: int) -> StepPlan:
    """The text as one prompt in one block."""
    sequence = TokenSequence(0, np.array(ids, np.int32), SamplingParams(max_tokens=1))
    sequence.block_table = [0]
    return build_plan(StepKind.PREFILL, [sequence], block_size)
