"""Any decoder that transformers can load: its own modules, with our paged attention behind its interface.

Every operation but attention and the linear layers is the published code's own, so this is the slower way;
what it buys is that a new architecture is served on the day transformers knows it. Whether the way is right
for a model is tried out at the start: a text computed in pieces over paged keys must agree with transformers'
own attention, or the model is refused.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from engine.errors import StartupError
from worker.attention.base import AttentionBackend
from worker.batch import Batch
from worker.config_values import MAX_INT
from worker.hf_config import DecoderConfig
from worker.kv_cache import KvCache
from worker.layers.adapted import AdaptedLinear, Projection, StepAdapters
from worker.loader import Checkpoint
from worker.models.configs import parse_generic
from worker.models.generic_load import load_model, refusal
from worker.models.generic_trial import deviation_in_pieces
from worker.parallel import ParallelGroup
from worker.platforms.base import Linear, Platform

log = logging.getLogger("llmmodels.generic")

# what a text in pieces may differ by from the whole, of the logits' length; mistakes are of order 1
_MAX_DEVIATION = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
_numbers = itertools.count()


class PackedModule(nn.Module):
    """A linear layer of the model's, computed as the platform does it best."""

    def __init__(self, linear: Linear, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self._linear = linear

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] -> [..., out]."""
        y = self._linear(x.reshape(-1, self.in_features))
        return y.view(*x.shape[:-1], self.out_features)


class _Given(nn.Module):
    """Stands where the decoder stood: what the model does behind it is done to hidden states of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.output: Any = None

    @property
    def decoder(self) -> _Given:
        """Some heads ask the decoder within the decoder."""
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.output


class PagedInterface:
    """What transformers calls in place of attention. One per model, under a name of its own."""

    def __init__(self, config: DecoderConfig, max_seq_len: int) -> None:
        self.name = f"paged-{next(_numbers)}"
        self._shape = (config.num_heads, config.num_kv_heads, config.head_dim)
        self._window = min(config.window or MAX_INT, max_seq_len)
        self._max_seq_len = max_seq_len
        self._backend: AttentionBackend | None = None
        self._cache: KvCache | None = None
        self.seen: list[int] = []  # layers that called in this step

    def begin_step(self, backend: AttentionBackend, cache: KvCache) -> None:
        self._backend, self._cache = backend, cache
        self.seen = []

    def __call__(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """query: [1, H, T, D]; key, value: [1, KV, T, D] -> [1, T, H, D]. ValueError: not what is served."""
        assert self._backend is not None and self._cache is not None
        self._check(query, key, value, attention_mask, options)
        q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
        usual = q.shape[-1] ** -0.5
        if scaling is not None and scaling != usual:
            q = q * (scaling / usual)
        layer: int = module.layer_idx
        self.seen.append(layer)
        out = self._backend.forward(q, k, v, *self._cache.layers[layer])
        return out.view(1, *q.shape), None

    def _check(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
    ) -> None:
        found = (query.shape[1], key.shape[1], query.shape[-1])
        if found != self._shape or value.shape != key.shape or query.shape[0] != 1:
            raise ValueError(
                f"its attention has heads, key heads and width {found}, values of {value.shape[-1]};"
                f" config.json says {self._shape}"
            )
        if mask is not None:
            raise ValueError("it masks attention in a way of its own")
        for name in ("softcap", "s_aux", "position_bias"):
            if options.get(name) is not None:
                raise ValueError(f"its attention takes {name}, which paged attention does not know")
        window = options.get("sliding_window")
        if min(window or MAX_INT, self._max_seq_len) != self._window:
            raise ValueError(
                f"a layer has window {window} and others another; it can be served with a maxSeqLen up to the"
                " smallest window only"
            )


class GenericCausalLM:
    """See worker/models/registry.py for the contract."""

    parse_config = staticmethod(parse_generic)

    def __init__(
        self,
        config: DecoderConfig,
        checkpoint: Checkpoint,
        platform: Platform,
        dtype: torch.dtype,
        max_seq_len: int,
        progress: Callable[[float], None],
        group: ParallelGroup,
    ) -> None:
        assert group.shard.size == 1  # the modules are transformers' own, and whole
        folder = checkpoint.folder
        self._interface = PagedInterface(config, max_seq_len)
        self.projections: dict[str, Projection] = {}
        self.step_adapters = StepAdapters()
        model = load_model(checkpoint, dtype, self._interface)
        progress(0.7)
        self._causal: Any = model.to(platform.device)
        self._decoder: Any = model.base_model
        self._given = _Given()
        setattr(model, model.base_model_prefix, self._given)
        for root in (self._decoder, model):
            self._pack(root, model.base_model_prefix if root is self._decoder else "", platform)
        platform.give_back_memory()
        progress(0.9)
        self._try_out(config, dtype, platform, checkpoint)
        log.warning(
            "%s runs through transformers' own modules: slower than a family of its own, and a seed repeats"
            " its text to rounding only (docs/models.md)",
            f"{folder.name}: {type(model).__name__}",
        )
        progress(1.0)

    @staticmethod
    def tensor_shapes(config: DecoderConfig) -> None:
        """transformers alone knows them, and says what is missing."""

    @staticmethod
    def ignorable_tensors(config: DecoderConfig) -> frozenset[str]:
        return frozenset()

    @torch.inference_mode()
    def forward(self, batch: Batch, attention: AttentionBackend, cache: KvCache) -> Tensor:
        self._interface.begin_step(attention, cache)
        output = self._decoder(
            input_ids=batch.input_ids[None].long(),
            position_ids=batch.positions[None].long(),
            use_cache=False,
            return_dict=True,
        )
        self._output_class = type(output)
        hidden: Tensor = output.last_hidden_state[0]
        return hidden

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        self._given.output = self._output_class(last_hidden_state=hidden[None])
        logits: Tensor = self._causal(inputs_embeds=hidden[None], use_cache=False, return_dict=True).logits[0]
        return logits

    def _pack(self, root: nn.Module, prefix: str, platform: Platform) -> None:
        """Put packed layers in place of the plain ones below `root`; each is open to LoRA under its name."""
        for parent_name, parent in list(root.named_modules(prefix=prefix)):
            for name, child in list(parent.named_children()):
                if type(child) is not nn.Linear:
                    continue
                bias = None if child.bias is None else child.bias.data
                packed = AdaptedLinear(platform.pack_linear(child.weight.data, bias), self.step_adapters)
                setattr(parent, name, PackedModule(packed, child.in_features, child.out_features))
                full_name = f"{parent_name}.{name}".lstrip(".")
                outputs, inputs = slice(0, child.out_features), slice(0, child.in_features)
                self.projections[full_name] = Projection(
                    packed, outputs, child.in_features, child.out_features, inputs, outputs
                )

    def _try_out(
        self, config: DecoderConfig, dtype: torch.dtype, platform: Platform, checkpoint: Checkpoint
    ) -> None:
        """StartupError in one line when what comes out is not what transformers computes."""
        try:
            deviation = deviation_in_pieces(self, self._whole, config, dtype, platform.device)
        except StartupError:
            raise
        except Exception as error:  # whatever the published code raises, the model cannot be served
            raise refusal(checkpoint, error) from error
        if sorted(self._interface.seen) != list(range(config.num_layers)):
            raise refusal(checkpoint, "not every layer attends, or one does it in a way of its own")
        if not deviation <= _MAX_DEVIATION[dtype]:
            raise refusal(
                checkpoint,
                f"a text in pieces differs from the whole by {deviation:.2g} of its logits: something besides"
                " keys and values goes from token to token",
            )

    def _whole(self, tokens: Tensor) -> Tensor:
        """tokens: int64 [n] -> logits [n, vocab] by transformers' own attention."""
        self._decoder.set_attn_implementation("sdpa" if self._decoder._supports_sdpa else "eager")
        output = self._decoder(input_ids=tokens[None], use_cache=False, return_dict=True)
        self._output_class = type(output)
        logits = self.logits(output.last_hidden_state[0])
        self._decoder.set_attn_implementation(self._interface.name)
        return logits
