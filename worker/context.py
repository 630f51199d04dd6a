"""What a worker process is given by the parent."""

from __future__ import annotations

from dataclasses import dataclass

from engine.settings import ModelSettings, ScheduleSettings
from engine.wire.links import Control, InstanceWire


@dataclass(frozen=True, slots=True)
class WorkerContext:
    model: ModelSettings
    schedule: ScheduleSettings
    wire: InstanceWire
    device: int
    num_workers: int  # on this machine; they share its processor
    control: Control
