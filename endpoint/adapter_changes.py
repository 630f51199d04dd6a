"""Loading and unloading LoRA adapters on the instances, one command and one answer at a time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence

from endpoint.instance_link import InstanceLink, LinkEnds
from engine.errors import EngineFailed, ServerError, ServiceUnavailable
from engine.wire.messages import LoraDone, LoraLoad, LoraUnload

log = logging.getLogger("server.adapters")


async def load_everywhere(links: Sequence[InstanceLink], name: str, path: str) -> str:
    """Have every instance load it; what is wrong with it, "" when all have.

    Only one change of a name at a time. Raises ServiceUnavailable or EngineFailed when an instance is or
    gets lost; others may have it by then.
    """
    if not all(link.serving for link in links):
        raise ServiceUnavailable("a model instance is not there now; try again later", retry_after_s=5)
    loads = (_change(link, LoraLoad(name, path)) for link in links)
    faults = []
    for result in await asyncio.gather(*loads, return_exceptions=True):  # all have answered by then
        if isinstance(result, BaseException):
            raise result
        faults.append(result)
    return next(filter(None, faults), "")


async def unload_everywhere(links: Sequence[InstanceLink], name: str) -> None:
    """Until no instance holds it. One that is not there, or dies over it, comes back without it."""
    unloads = (_change(link, LoraUnload(name)) for link in links if link.serving)
    for result in await asyncio.gather(*unloads, return_exceptions=True):
        if isinstance(result, BaseException) and not isinstance(result, ServerError):
            raise result


async def bring_in_line(
    link: InstanceLink,
    ends: LinkEnds,
    has: Mapping[str, str],
    wanted_of: Callable[[Mapping[str, str]], Mapping[str, str]],
) -> bool:
    """Until an instance that has just come up has what it has to have, which may change meanwhile.

    `has`: name and directory of the adapters it came with; `wanted_of` tells from it those it has to have.
    False when it has died over it.
    """
    tried: set[str] = set()
    while True:
        wanted = wanted_of(has)
        commands: list[LoraLoad | LoraUnload] = [LoraUnload(name) for name in has if name not in wanted]
        lacking = [name for name in wanted if name not in has and name not in tried]
        commands += [LoraLoad(name, wanted[name]) for name in lacking]
        if not commands:
            return True
        loaded = {}
        for command in commands:
            try:
                fault = await _change(link, command)
            except ServerError as error:
                fault = str(error)
            if link.ends is not ends:
                return False
            if fault:
                log.error("instance %d, adapter %s: %s", link.instance, command.name, fault)
            elif isinstance(command, LoraLoad):
                loaded[command.name] = command.path
        tried.update(lacking)
        has = {name: path for name, path in {**has, **loaded}.items() if name in wanted}


def note_done(link: InstanceLink, message: LoraDone) -> None:
    """The instance has answered."""
    wait = link.adapter_waits.pop(message.name, None)
    if wait is not None and not wait.done():
        wait.set_result(message.error)


def note_death(link: InstanceLink) -> None:
    """It will not answer any more."""
    for wait in link.adapter_waits.values():
        if not wait.done():
            wait.set_exception(EngineFailed("the model instance died while its adapters were changed"))
    link.adapter_waits.clear()


async def _change(link: InstanceLink, command: LoraLoad | LoraUnload) -> str:
    wait: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    if not link.send(command):
        raise ServiceUnavailable("a model instance is not there; try again later", retry_after_s=5)
    link.adapter_waits[command.name] = wait
    return await wait
