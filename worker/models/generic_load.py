"""Loading for the generic adapter: what transformers makes of a directory, or why it cannot, in one line."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from engine.errors import EXIT_INIT, StartupError
from worker.config_values import ConfigValues
from worker.loader import Checkpoint

log = logging.getLogger("llmmodels.generic")

_NO_INTERFACE = "its attention does not go through transformers' attention interface"
_SHOWN_NAMES = 3
_MAX_REASON = 300


def load_model(checkpoint: Checkpoint, dtype: torch.dtype, interface: Any) -> Any:
    """The model in eval mode, its attention `interface`, a callable with a name.

    No code of the directory is run.
    """
    if checkpoint.quantisation.types:
        raise refusal(checkpoint, "quantised weights are read for the families of docs/models.md only")
    # takes seconds, and nobody else in a worker needs it
    import transformers
    from transformers.modeling_utils import AttentionInterface

    library: Any = transformers
    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()
    AttentionInterface.register(interface.name, interface)
    load: Callable[..., Any] = library.AutoModelForCausalLM.from_pretrained
    try:
        model, report = load(
            checkpoint.folder,
            dtype=dtype,
            attn_implementation=interface.name,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except KeyError as error:  # a model with a table of its own looks the name up there
        raise refusal(checkpoint, _NO_INTERFACE if interface.name in error.args else error) from error
    except Exception as error:  # a directory from elsewhere may break any assumption of the library
        raise refusal(checkpoint, error) from error
    named = ConfigValues.read(checkpoint.folder / "config.json").texts("architectures")
    if type(model).__name__ not in named:  # transformers goes by model_type
        raise refusal(
            checkpoint, f"its architectures are {named}, its model_type is {type(model).__name__}'s"
        )
    if not model._supports_attention_backend:
        raise refusal(checkpoint, _NO_INTERFACE)
    if model.base_model is model:
        raise refusal(checkpoint, "its decoder and head cannot be told apart")
    for what in ("missing_keys", "mismatched_keys"):
        if names := sorted(str(name) for name in report[what]):
            more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
            kind = what.removesuffix("_keys")
            raise refusal(checkpoint, f"{kind} tensors: {', '.join(names[:_SHOWN_NAMES])}{more}")
    if names := sorted(report["unexpected_keys"]):
        log.info("tensors of no use: %s", ", ".join(names[:_SHOWN_NAMES]))
    return model.eval()


def refusal(checkpoint: Checkpoint, reason: object) -> StartupError:
    """What the generic adapter cannot serve; the first line of the reason is told."""
    text = (str(reason).strip().splitlines() or [type(reason).__name__])[0][:_MAX_REASON]
    return StartupError(
        f"{checkpoint.folder / 'config.json'}: this architecture has no family of its own (docs/models.md)"
        f" and cannot run through transformers: {text}",
        EXIT_INIT,
    )
