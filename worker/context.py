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
    rank: int  # of its instance; 0 leads
    num_ranks: int  # of its instance; they divide the model
    num_workers: int  # on this machine; they share its processor
    init_timeout_s: float  # until a worker must be ready
    step_timeout_s: float  # longest time without progress, besides what the tokens of a step add
    control: Control
    pulse: Pulse
    keepsake: Keepsake
