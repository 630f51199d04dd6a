"""Messages as msgpack arrays: element 0 is the tag, then the fields in order."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import msgpack

from engine.sampling_params import SamplingParams
from engine.wire import messages as m

_TAGS: dict[int, type[m.Message]] = {
    1: m.Submit,
    2: m.Abort,
    3: m.LoraLoad,
    4: m.LoraUnload,
    10: m.EngineReady,
    11: m.EngineStats,
    12: m.LoraDone,
    19: m.Hello,
    20: m.Ready,
    21: m.Fatal,
    22: m.Quiet,
    23: m.Progress,
    24: m.StopRequested,
    25: m.Linked,
    30: m.Drain,
    32: m.InstanceDown,
    33: m.InstanceUp,
    34: m.EndpointDown,
    35: m.EndpointUp,
    37: m.Reconfigure,
}
_TAG_OF = {cls: tag for tag, cls in _TAGS.items()}
_FIELDS = {cls: tuple(f.name for f in fields(cls)) for cls in (*_TAG_OF, SamplingParams)}


class WireError(Exception):
    """A frame that is not a message of ours."""


def encode(message: m.Message) -> bytes:
    row: list[Any] = [_TAG_OF[type(message)]]
    for name in _FIELDS[type(message)]:
        value = getattr(message, name)
        row.append(_pack_sampling(value) if isinstance(value, SamplingParams) else value)
    return msgpack.packb(row)  # type: ignore[no-any-return]


def decode(frame: bytes) -> m.Message:
    """Raises WireError on anything but a known tag with the right number of fields."""
    try:
        tag, *values = msgpack.unpackb(frame, use_list=False)
        cls = _TAGS[tag]
    except (ValueError, TypeError, KeyError, msgpack.UnpackException) as error:
        raise WireError(f"not a message: {type(error).__name__}") from None
    if len(values) != len(_FIELDS[cls]):
        raise WireError(f"{cls.__name__}: {len(values)} fields instead of {len(_FIELDS[cls])}")
    try:
        if cls is m.Submit:
            values[-1] = SamplingParams(*values[-1])
        return cls(*values)
    except TypeError:
        raise WireError(f"{cls.__name__}: its fields are not what they should be") from None


def _pack_sampling(params: SamplingParams) -> list[Any]:
    return [getattr(params, name) for name in _FIELDS[SamplingParams]]
