"""Which processes a configuration asks for. Pure: no process is touched here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engine.settings import ServerSettings


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    role: Literal["endpoint", "worker"]
    instance: int = 0
    rank: int = 0
    device: int = 0

    @property
    def identity(self) -> str:
        return "endpoint" if self.role == "endpoint" else f"worker.{self.instance}.{self.rank}"

    def __str__(self) -> str:
        if self.role == "endpoint":
            return "role=endpoint"
        return f"role=worker instance={self.instance} rank={self.rank} device={self.device}"


def plan_processes(settings: ServerSettings) -> list[ProcessSpec]:
    """The endpoint first (it can already tell how loading goes), then one worker per device."""
    workers = [
        ProcessSpec("worker", instance, rank, device)
        for instance, devices in enumerate(settings.device_ids)
        for rank, device in enumerate(devices)
    ]
    return [ProcessSpec("endpoint"), *workers]
