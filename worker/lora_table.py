"""The LoRA adapters a worker has: read beside the step loop, installed and removed between steps."""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from engine.errors import EXIT_INIT, StartupError
from engine.file_modes import DIRECTORY_MODE, access_problems
from engine.plan import StepPlan
from engine.settings import LoraModule, LoraSettings
from worker.batch import Batch
from worker.layers.adapted import Projection, StepAdapters, TokensOf
from worker.lora import Adapter, read_adapter
from worker.platforms.base import Platform

log = logging.getLogger("llmmodels.lora")


class LoraTable:
    """Implements engine.adapters.AdapterStore for a loaded model."""

    def __init__(
        self,
        projections: Mapping[str, Projection],
        step: StepAdapters,
        dtype: torch.dtype,
        platform: Platform,
        settings: LoraSettings,
    ) -> None:
        self._projections = projections
        self._step = step
        self._dtype = dtype
        self._platform = platform
        self._settings = settings
        self._installed: dict[str, Adapter] = {}
        self._paths: dict[str, Path] = {}  # of the installed ones
        # by threads: the name, its directory, and the adapter or what is wrong with it
        self._read: deque[tuple[str, Path, Adapter | str]] = deque()
        self._under_way = 0
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def __contains__(self, name: object) -> bool:
        return name in self._installed

    def loaded(self) -> list[tuple[str, str]]:
        """Name and directory of each."""
        return [(name, str(path)) for name, path in self._paths.items()]

    def fileno(self) -> int:
        """Readable when `take_loaded` has something to do."""
        return self._wake

    # -- coming and going -------------------------------------------------------------------------------

    def load_static(self, modules: Sequence[LoraModule]) -> None:
        """Raises StartupError for the first that does not fit."""
        for module in modules:
            self._install(module.name, module.path, self._read_now(module.path))

    def load(self, name: str, path: str) -> None:
        """Begin reading; `take_loaded` tells of the end. Steps go on meanwhile."""
        self._under_way += 1
        threading.Thread(target=self._read_aside, args=(name, Path(path)), daemon=True).start()

    def take_loaded(self) -> list[tuple[str, str]]:
        """Install what has been read since the last call; each name with what is wrong, "" for nothing."""
        if not self._under_way:
            return []
        try:
            count = os.eventfd_read(self._wake)
        except BlockingIOError:
            return []
        self._under_way -= count
        done = []
        for name, path, result in (self._read.popleft() for _ in range(count)):
            if isinstance(result, Adapter):
                self._install(name, path, result)
                result = ""
            done.append((name, result))
        return done

    def install(self, name: str, path: str) -> str:
        """Read and install now; what is wrong with it, "" for nothing."""
        try:
            self._install(name, Path(path), self._read_now(Path(path)))
        except StartupError as error:
            return str(error)
        return ""

    def remove(self, name: str) -> None:
        """An unknown name is fine."""
        adapter = self._installed.pop(name, None)
        if adapter is not None:
            del self._paths[name]
            for layer, _ in adapter.deltas:
                layer.deltas.pop(name, None)
            log.info("adapter %s unloaded", name)

    def _install(self, name: str, path: Path, adapter: Adapter) -> None:
        self.remove(name)  # left by a load that nobody waited for any more; it may adapt other layers
        for layer, delta in adapter.deltas:
            layer.deltas[name] = delta
        self._installed[name] = adapter
        self._paths[name] = path
        log.info("adapter %s loaded: rank %d, %.1f MiB", name, adapter.rank, adapter.num_bytes / 2**20)

    def _read_aside(self, name: str, path: Path) -> None:
        result: Adapter | str
        try:
            self._check_access(path)
            result = self._read_now(path)
        except StartupError as error:
            result = str(error)
        except Exception as error:  # whatever it is, it is this adapter's failure and nobody else's
            log.exception("adapter %s", name)
            result = f"{path}: cannot be read: {type(error).__name__}"
        self._read.append((name, path, result))
        os.eventfd_write(self._wake, 1)

    def _read_now(self, path: Path) -> Adapter:
        return read_adapter(
            path,
            self._projections,
            self._dtype,
            self._platform,
            max_rank=self._settings.max_rank,
            available_bytes=self._platform.memory().available,
        )

    def _check_access(self, path: Path) -> None:
        """The validator has done this for the adapters of the configuration."""
        if self._settings.file_policy == "off":
            return
        try:
            problems = access_problems(path, DIRECTORY_MODE)
        except OSError as error:
            raise StartupError(f"{path}: cannot be read: {error.strerror}", EXIT_INIT) from None
        for wrong, command in problems:
            if self._settings.file_policy == "refuse":
                raise StartupError(f"{path}: {wrong}; run: {command}", EXIT_INIT)
            log.warning("adapter %s: %s; run: %s", path, wrong, command)

    # -- steps ------------------------------------------------------------------------------------------

    def begin_step(self, plan: StepPlan, batch: Batch) -> None:
        """Tell the layers which tokens of the step are whose. `batch` is made of `plan`."""
        self._step.groups = self._groups(plan, batch) if self._installed else None

    def _groups(self, plan: StepPlan, batch: Batch) -> list[TokensOf] | None:
        names = [sequence.params.lora for sequence in plan.sequences]
        if not any(names):
            return None
        if batch.order is not None:
            names = [names[row] for row in batch.order]
        distinct = dict.fromkeys(names)
        if len(distinct) == 1:
            return [TokensOf(names[0], None)]
        name_of_token = np.repeat(np.array(names), np.diff(batch.query_start))
        device = self._platform.device
        return [
            TokensOf(name, torch.from_numpy(np.flatnonzero(name_of_token == name)).to(device))
            for name in distinct
            if name
        ]
