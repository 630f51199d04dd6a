"""What the endpoint process is given by the parent."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass

from engine.settings import EndpointSettings, ModelSettings, ScheduleSettings
from engine.wire.links import Control, InstanceWire
from engine.wire.vitals import Pulse


@dataclass(frozen=True, slots=True)
class EndpointContext:
    settings: EndpointSettings
    schedule: ScheduleSettings
    model: ModelSettings
    sockets: Sequence[socket.socket]  # bound, one per settings.listeners, in that order
    wires: Sequence[InstanceWire]
    control: Control
    pulse: Pulse
    step_timeout_s: float  # longest time without a sign of life
    replaces_another: bool  # which has died while it served
