"""The adapters of an instance of several ranks: none is in force before every rank has its part."""

from __future__ import annotations

from collections.abc import Sequence

from engine.step_channel import StepSender
from engine.step_records import InstallAdapter, RemoveAdapter, encode
from worker.lora_table import LoraTable
from worker.parallel import ParallelGroup


class SharedAdapters:
    """The leader's; implements engine.adapters.AdapterStore."""

    def __init__(self, own: LoraTable, followers: StepSender, group: ParallelGroup) -> None:
        self._own = own
        self._followers = followers
        self._group = group

    def __contains__(self, name: object) -> bool:
        return name in self._own

    def loaded(self) -> Sequence[tuple[str, str]]:
        return self._own.loaded()

    def fileno(self) -> int:
        return self._own.fileno()

    def load(self, name: str, path: str) -> None:
        self._own.load(name, path)

    def take_loaded(self) -> Sequence[tuple[str, str]]:
        """What the leader has read beside its steps the others read now, while its files are in memory."""
        done = []
        for name, fault in self._own.take_loaded():
            if not fault:
                path = dict(self._own.loaded())[name]
                self._followers.send(encode(InstallAdapter(name, path)))
                if not self._group.least(1):
                    self.remove(name)
                    fault = f"{path}: another rank of the instance cannot read it; its log tells why"
            done.append((name, fault))
        return done

    def remove(self, name: str) -> None:
        self._own.remove(name)
        self._followers.send(encode(RemoveAdapter(name)))
