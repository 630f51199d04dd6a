"""The LoRA adapters requests may name, and how they come and go on every model instance."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from endpoint.bounds import Bounds
from engine.errors import NotFound, ServerError, WrongState
from engine.settings import LoraSettings

log = logging.getLogger("server.adapters")


class Engine(Protocol):
    """What carries the changes out."""

    async def load_adapter(self, name: str, path: str) -> str: ...

    async def unload_adapter(self, name: str) -> None: ...


class AdapterRegistry:
    """One per endpoint process. An adapter is known from the end of its loading on, until its unloading."""

    def __init__(self, settings: LoraSettings, base: str, engine: Engine, *, adopts: bool = False) -> None:
        """`base`: name of the model the adapters are for.

        `adopts`: what the first instance has is what there is, whatever the configuration began with: another
        endpoint has served before this one.
        """
        self._settings = settings
        self._base = base
        self._engine = engine
        self._paths = {module.name: module.path for module in settings.modules}
        self._roots = {name: path.name for name, path in self._paths.items()}
        self._adopts = adopts
        self._changing: dict[str, asyncio.Task[None]] = {}
        self.loaded: Mapping[str, str] = MappingProxyType(self._roots)  # name -> name of its directory, live

    def wanted(self, has: Mapping[str, str]) -> Mapping[str, str]:
        """Name and directory of what an instance that has just come up has to have. `has`: what it has."""
        if self._adopts:
            self._adopts = False
            self._paths = {name: Path(path) for name, path in has.items()}
            self._roots.clear()
            self._roots.update({name: path.name for name, path in self._paths.items()})
        return {name: str(path) for name, path in self._paths.items()}

    def register_bounds(self, bounds: Bounds) -> None:
        if self._settings.dynamic:
            bounds.register("adapters", self._num_taken, self._settings.max_loras)

    async def load(self, name: str, path: Path) -> None:
        """Until every instance serves it. Raises WrongState with the reason when that cannot be."""
        self._check_dynamic()
        self._check_settled(name)
        if name == self._base:
            raise WrongState(f"`lora_name` is {name!r}, the base model's name; choose another")
        if name in self._paths:
            if self._paths[name] == path:
                return
            raise WrongState(
                f"the adapter {name!r} is loaded from another directory; choose another name, or unload it "
                "first"
            )
        if self._num_taken() >= self._settings.max_loras:
            raise WrongState(
                f"{self._settings.max_loras} adapters are loaded, as many as maxLoras allows; unload one "
                "first"
            )
        await self._finish(name, self._load(name, path))

    async def unload(self, name: str) -> None:
        """Until no instance holds it: the last request that uses it ends first; new ones are refused at once.

        Raises NotFound for an unknown name, WrongState when adapters stay as they are.
        """
        self._check_dynamic()
        self._check_settled(name)
        if name not in self._paths:
            raise NotFound("no adapter of this name is loaded; GET /v1/models lists the loaded ones")
        await self._finish(name, self._unload(name))

    def _num_taken(self) -> int:
        """Places of maxLoras that are taken: also by what is coming or going."""
        return len(self._paths.keys() | self._changing.keys())

    def _check_dynamic(self) -> None:
        if not self._settings.dynamic:
            raise WrongState(
                "loading and unloading adapters at run time is off; set maxLoras and maxLoraRank in the "
                "configuration to values above 0 and restart"
            )

    def _check_settled(self, name: str) -> None:
        if name in self._changing:
            raise WrongState(f"the adapter {name!r} is being loaded or unloaded; try again when that is done")

    async def _finish(self, name: str, change: Coroutine[Any, Any, None]) -> None:
        """Carry the change through even when the client that asked for it hangs up."""
        task = asyncio.ensure_future(change)
        self._changing[name] = task
        task.add_done_callback(lambda _: self._end(name))
        await asyncio.shield(task)

    def _end(self, name: str) -> None:
        task = self._changing.pop(name)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("adapter %s: %s", name, error)

    async def _load(self, name: str, path: Path) -> None:
        self._paths[name] = path  # an instance that is replaced meanwhile has to have it too
        try:
            fault = await self._engine.load_adapter(name, str(path))
            if fault:
                raise WrongState(f"the adapter {name!r} cannot be loaded: {fault}")
        except ServerError:
            del self._paths[name]
            await self._engine.unload_adapter(name)  # where it has succeeded
            raise
        self._roots[name] = path.name
        log.info("adapter %s loaded from %s", name, path)

    async def _unload(self, name: str) -> None:
        del self._paths[name], self._roots[name]
        await self._engine.unload_adapter(name)
        log.info("adapter %s unloaded", name)
