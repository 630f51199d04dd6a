"""The periodic check that npuUsageThreshold asks for: a trial token, and how busy the devices are."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from enum import Enum
from typing import Protocol

import psutil

from endpoint.health import Health, State
from endpoint.trial import Trials
from engine.errors import RequestTimeout, ServerError

log = logging.getLogger("server.health")

_ROUND_S = 5.0  # from one round to the next, and how long its trial may take
_SAMPLES = 3  # of the utilisation in a round
_BUSY_ENOUGH = 50.0  # per cent: so busy a device is at work, and needs no trial beside it
_MAX_SKIPPED = 17  # rounds without a trial in a row


class Found(Enum):
    """What came of the trial of a round."""

    TOKEN = "token"
    TIMEOUT = "timeout"
    ERROR = "error"


class Judge:
    """Draws conclusions from one round after the other. Pure: no clock, no engine."""

    def __init__(self, threshold: int) -> None:
        """`threshold`: per cent of utilisation from which a missing token means busy instead of broken."""
        self._threshold = threshold
        self._utilisation = 0.0  # of the round before
        self._good = True  # the last trial gave no cause for doubt
        self._skipped = 0

    def wants_trial(self) -> bool:
        """Ask once per round. Without a trial all stays as it is."""
        if self._good and self._utilisation >= _BUSY_ENOUGH and self._skipped < _MAX_SKIPPED:
            self._skipped += 1
            return False
        self._skipped = 0
        return True

    def sampled(self, utilisation: float) -> None:
        """`utilisation`: per cent, of the busiest device in a round."""
        self._utilisation = utilisation

    def judge(self, found: Found) -> State | None:
        """The state that follows, None when it stays as it is: one bad round may be an accident."""
        if found is Found.TOKEN:
            self._good = True
            return State.NORMAL
        if found is Found.TIMEOUT and self._utilisation >= self._threshold:
            self._good = False
            return State.BUSY
        first, self._good = self._good, False
        return None if first and found is Found.TIMEOUT else State.ABNORMAL


class Utilisation(Protocol):
    def sample(self) -> float:
        """Per cent, 0..100: of the busiest device since the last call. May take milliseconds."""


class WorkerLoad:
    """The processors are the device: how busy each engine worker keeps one."""

    def __init__(self) -> None:
        self._workers: dict[int, psutil.Process] = {}

    def sample(self) -> float:
        # by pid, because a process object measures from its own last call, and workers are replaced
        found = {process.pid: process for process in psutil.Process(os.getppid()).children()}
        found.pop(os.getpid(), None)
        self._workers = {pid: self._workers.get(pid, process) for pid, process in found.items()}
        busiest = 0.0
        for process in self._workers.values():
            with contextlib.suppress(psutil.Error):
                busiest = max(busiest, process.cpu_percent())
        return min(100.0, busiest)


class Unknown:
    """Of a device that nothing here can measure."""

    def __init__(self, device: str) -> None:
        log.warning(
            "the utilisation of %s devices cannot be measured by this build and is taken for 0: the health "
            "check will call an engine that is only busy abnormal; npuUsageThreshold=0 turns it off",
            device,
        )

    def sample(self) -> float:
        return 0.0


def utilisation_of(device: str) -> Utilisation:
    """`device`: as in EngineReady."""
    return WorkerLoad() if device in ("cpu", "mock") else Unknown(device)


class Checker:
    """Tells `health` what each round finds."""

    def __init__(self, health: Health, trials: Trials, utilisation: Utilisation, threshold: int) -> None:
        """`threshold`: as Judge has it."""
        self._health = health
        self._trials = trials
        self._utilisation = utilisation
        self._judge = Judge(threshold)

    async def run(self) -> None:
        """Runs for ever, a round every five seconds."""
        await asyncio.to_thread(self._utilisation.sample)  # the first call only begins to measure
        while True:
            await self.round(_ROUND_S)

    async def round(self, seconds: float) -> None:
        """One trial, if one is due, beside samples that take all of the time."""
        wanted = self._health.any_serving and self._judge.wants_trial()
        trial = asyncio.ensure_future(self._trial(seconds)) if wanted else None
        try:
            busiest = 0.0
            for _ in range(_SAMPLES):
                await asyncio.sleep(seconds / _SAMPLES)
                busiest = max(busiest, await asyncio.to_thread(self._utilisation.sample))
            self._judge.sampled(busiest)
            if trial is not None and (timeout := await trial):
                self._conclude(Found.TIMEOUT, f"{timeout}; devices {busiest:.0f} % busy")
        finally:
            if trial is not None:
                trial.cancel()

    async def _trial(self, seconds: float) -> str:
        """What it ran into when its time was up: only the samples tell what that means."""
        try:
            await self._trials.run(seconds)
        except RequestTimeout as error:
            return str(error)
        except ServerError as error:
            self._conclude(Found.ERROR, str(error))
        else:
            self._conclude(Found.TOKEN, "")
        return ""

    def _conclude(self, found: Found, why: str) -> None:
        state = self._judge.judge(found)
        if state is None:
            log.warning("health check: %s; the state is abnormal if it happens again", why)
        else:
            self._health.checked(state, why)
