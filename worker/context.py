"""What a worker process is given by the parent."""

from __future__ import annotations

from dataclasses import dataclass

from engine.settings import ModelSettings, ScheduleSettings
from engine.wire.keepsake import Keepsake
from engine.wire.links import Control, InstanceWire
from engine.wire.vitals import Pulse


@dataclass(frozen=True, slots=True)
class WorkerContext:
    model: ModelSettings
    schedule: ScheduleSettings
    wire: InstanceWire
    generation: int  # of the link to begin with
    device: int
    num_workers: int  # on this machine; they share its processor
    step_timeout_s: float  # longest time without progress, besides what the tokens of a step add
    control: Control
    pulse: Pulse
    keepsake: Keepsake
