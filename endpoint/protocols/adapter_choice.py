"""Which LoRA adapter a request names; adapters come and go while the server runs."""

from __future__ import annotations

import re

from endpoint.protocols.base import ModelInfo
from endpoint.validation import Fields, show

_ADVICE = "GET /v1/models lists them"
ADAPTER_PATTERN = re.compile(r"[A-Za-z0-9_./-]{1,256}")


def adapter_of_model(fields: Fields, model: ModelInfo) -> str:
    """SamplingParams.lora for the model that `model` names, which must be there. Raises InvalidRequest."""
    value = fields.raw("model")
    if value == model.name:
        return ""
    if isinstance(value, str) and value in model.adapters:
        return value
    raise fields.error("model", f"{show(model.name)} or the name of a loaded adapter", _ADVICE)


def adapter_of_id(parameters: Fields, model: ModelInfo) -> str:
    """SamplingParams.lora for `adapter_id`; nothing and "None" mean the base model. Raises InvalidRequest."""
    value = parameters.raw("adapter_id")
    if value in (None, "None", model.name):
        return ""
    if not isinstance(value, str) or not ADAPTER_PATTERN.fullmatch(value):
        raise parameters.error("adapter_id", "1 to 256 letters, digits or any of _ . / -")
    if value in model.adapters:
        return value
    raise parameters.error(
        "adapter_id", f'"None", {show(model.name)} or the name of a loaded adapter', _ADVICE
    )
