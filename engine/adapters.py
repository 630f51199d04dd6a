"""LoRA adapters as the step loop sees them: loaded beside it, and taken away once nobody uses them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from engine.scheduler import Scheduler
from engine.wire.messages import LoraDone, LoraLoad, LoraUnload

_NONE_HERE = "this worker takes no adapters (modelInstanceType StandardMock)"


class AdapterStore(Protocol):
    """Where an instance keeps its adapters."""

    def __contains__(self, name: object) -> bool: ...

    def loaded(self) -> Sequence[tuple[str, str]]:
        """Name and directory of each."""

    def load(self, name: str, path: str) -> None:
        """Begin loading; returns at once."""

    def take_loaded(self) -> Sequence[tuple[str, str]]:
        """Put in force what has been loaded; each name with what is wrong with it, "" for nothing."""

    def remove(self, name: str) -> None:
        """No step may need it any more."""

    def fileno(self) -> int:
        """Readable when `take_loaded` has something."""


class AdapterDesk:
    """Carries out LoraLoad and LoraUnload between steps, and answers each with one LoraDone."""

    def __init__(
        self, store: AdapterStore | None, scheduler: Scheduler, send: Callable[[LoraDone], None]
    ) -> None:
        """`store`: None where there are no weights to adapt."""
        self._store = store
        self._scheduler = scheduler
        self._send = send
        self._leaving: set[str] = set()
        self._num_loading = 0

    @property
    def is_busy(self) -> bool:
        """Whether something is on its way in or out, so that `settle` is to be called between steps."""
        return bool(self._num_loading or self._leaving)

    def filenos(self) -> list[int]:
        """What becomes readable when `settle` has something to do."""
        return [] if self._store is None else [self._store.fileno()]

    def serves(self, name: str) -> bool:
        """Whether new requests may use the adapter; "" is the base model."""
        return not name or (self._store is not None and name in self._store and name not in self._leaving)

    def receive(self, command: LoraLoad | LoraUnload) -> None:
        if self._store is None:
            self._send(LoraDone(command.name, _NONE_HERE))
        elif isinstance(command, LoraLoad):
            self._num_loading += 1
            self._store.load(command.name, command.path)
        else:
            self._leaving.add(command.name)

    def settle(self) -> None:
        """Between steps: adapters that have been read come into force, those nobody uses any more go."""
        if self._store is None:
            return
        for name, error in self._store.take_loaded():
            self._num_loading -= 1
            self._send(LoraDone(name, error))
        if self._leaving:
            for name in self._leaving - {group.params.lora for group in self._scheduler.groups}:
                self._store.remove(name)
                self._leaving.discard(name)
                self._send(LoraDone(name, ""))
