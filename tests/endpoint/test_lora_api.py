"""Bodies of the two adapter routes, and the registry before an engine that answers when it is told to."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import zmq

from endpoint import models_api
from endpoint.adapters import AdapterRegistry
from endpoint.engine_client import EngineClient
from endpoint.lora_api import parse_load, parse_unload
from endpoint.protocols.adapter_choice import adapter_of_id, adapter_of_model
from endpoint.validation import Fields
from engine.errors import EngineFailed, InvalidRequest, NotFound, ServiceUnavailable, WrongState
from engine.settings import LoraModule, LoraSettings
from engine.wire import sizes
from engine.wire.channel import Channel
from engine.wire.links import InstanceWire
from engine.wire.messages import EngineReady, LoraDone, LoraLoad, LoraUnload
from engine.wire.ring import create_ring
from tests.endpoint.samples import model_info

BASE = "llama"
FIXED = LoraModule("fixed", Path("/loras/fixed"))
SETTINGS = LoraSettings(modules=(FIXED,), max_loras=3, max_rank=8, root=Path("/root"))


class Engine:
    """Notes what it is asked; answers at once unless `gate` is shut."""

    def __init__(self) -> None:
        self.commands: list[LoraLoad | LoraUnload] = []
        self.fault = ""
        self.error: Exception | None = None
        self.gate = asyncio.Event()
        self.gate.set()

    async def change_adapters(self, command: LoraLoad | LoraUnload) -> str:
        self.commands.append(command)
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        return self.fault if isinstance(command, LoraLoad) else ""


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


# -- bodies --


def test_a_path_is_relative_to_the_installation_and_written_one_way() -> None:
    for path, wanted in (("a/b", "/root/a/b"), ("/x/./y//z/", "/x/y/z"), ("..a", "/root/..a")):
        asked = parse_load({"lora_name": "a-B_9", "lora_path": path}, BASE, Path("/root"))
        assert asked == ("a-B_9", Path(wanted))
    asked = parse_load({"lora_name": "a", "lora_path": "b", "master_model": BASE, "more": 1}, BASE, Path("/"))
    assert asked.name == "a"
    assert parse_unload({"lora_name": "a", "lora_path": 7}) == "a"


@pytest.mark.parametrize(
    ("body", "part"),
    [
        ({"lora_path": "x"}, "`lora_name` is missing"),
        ({"lora_name": "a.b", "lora_path": "x"}, '`lora_name` is "a.b"'),
        ({"lora_name": "None", "lora_path": "x"}, 'not "None"'),
        ({"lora_name": "a"}, "`lora_path` is missing"),
        ({"lora_name": "a", "lora_path": "a/../b"}, "without `..`"),
        ({"lora_name": "a", "lora_path": "b", "master_model": "c"}, 'must be "llama", the served model'),
    ],
)
def test_refusals_name_the_member(body: dict[str, Any], part: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_load(body, BASE, Path("/"))
    assert part in str(caught.value)


# -- registry --


def test_an_adapter_is_named_only_between_loading_and_unloading() -> None:
    async def work() -> None:
        engine = Engine()
        registry = AdapterRegistry(SETTINGS, BASE, engine)
        info = replace(model_info(BASE), adapters=registry.loaded)
        fields = Fields({"model": "guest", "adapter_id": "guest"})
        engine.gate.clear()
        loading = asyncio.create_task(registry.load("guest", Path("/dir/of-guest")))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert engine.commands == [LoraLoad("guest", "/dir/of-guest")]
        for choose in (adapter_of_model, adapter_of_id):
            with pytest.raises(InvalidRequest):
                choose(fields, info)
        engine.gate.set()
        await loading
        assert dict(registry.loaded) == {"fixed": "fixed", "guest": "of-guest"}
        assert adapter_of_model(fields, info) == adapter_of_id(fields, info) == "guest"
        engine.gate.clear()
        unloading = asyncio.create_task(registry.unload("guest"))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert dict(registry.loaded) == {"fixed": "fixed"}
        for choose in (adapter_of_model, adapter_of_id):
            with pytest.raises(InvalidRequest):
                choose(fields, info)
        engine.gate.set()
        await unloading
        assert engine.commands[1:] == [LoraUnload("guest")]

    run(work())


def test_a_name_that_is_changing_is_left_alone_and_counts() -> None:
    async def work() -> None:
        engine = Engine()
        registry = AdapterRegistry(SETTINGS, BASE, engine)
        engine.gate.clear()
        changes = [
            asyncio.create_task(registry.load("a", Path("/a"))),
            asyncio.create_task(registry.unload("fixed")),
        ]
        await asyncio.sleep(0)
        for again in (
            registry.load("a", Path("/a")),
            registry.unload("a"),
            registry.load("fixed", FIXED.path),
        ):
            with pytest.raises(WrongState, match="is being loaded or unloaded"):
                await again
        changes.append(asyncio.create_task(registry.load("b", Path("/b"))))
        await asyncio.sleep(0)
        with pytest.raises(WrongState, match="maxLoras"):  # the leaving one still has its memory
            await registry.load("c", Path("/c"))
        engine.gate.set()
        await asyncio.gather(*changes)
        await registry.load("c", Path("/c"))
        assert set(registry.loaded) == {"a", "b", "c"}

    run(work())


def test_a_load_that_fails_anywhere_is_undone_everywhere() -> None:
    async def work() -> None:
        engine = Engine()
        engine.fault = "rank 9 is too much"
        registry = AdapterRegistry(SETTINGS, BASE, engine)
        with pytest.raises(WrongState, match="cannot be loaded: rank 9 is too much"):
            await registry.load("a", Path("/a"))
        assert engine.commands == [LoraLoad("a", "/a"), LoraUnload("a")]
        assert set(registry.loaded) == {"fixed"}
        engine.fault = ""
        await registry.load("a", Path("/a"))
        assert set(registry.loaded) == {"fixed", "a"}

    run(work())


def test_a_lost_instance_is_told_and_leaves_the_name_free() -> None:
    async def work() -> None:
        engine = Engine()
        engine.error = EngineFailed("died")
        registry = AdapterRegistry(SETTINGS, BASE, engine)
        with pytest.raises(EngineFailed):
            await registry.load("a", Path("/a"))
        engine.error = None
        await registry.load("a", Path("/a"))

    run(work())


def test_a_client_that_hangs_up_does_not_stop_the_change() -> None:
    async def work() -> None:
        engine = Engine()
        registry = AdapterRegistry(SETTINGS, BASE, engine)
        engine.gate.clear()
        loading = asyncio.create_task(registry.load("a", Path("/a")))
        await asyncio.sleep(0)
        loading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await loading
        with pytest.raises(WrongState):
            await registry.unload("a")
        engine.gate.set()
        while "a" not in registry.loaded:
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        await registry.unload("a")

    run(work())


def test_names_that_are_taken() -> None:
    async def work() -> None:
        engine = Engine()
        registry = AdapterRegistry(SETTINGS, BASE, engine)
        await registry.load("fixed", FIXED.path)
        for name in ("fixed", BASE):
            with pytest.raises(WrongState, match=name):
                await registry.load(name, Path("/other"))
        for name in ("stranger", BASE):
            with pytest.raises(NotFound):
                await registry.unload(name)
        assert engine.commands == []

    run(work())


@pytest.mark.parametrize(("loras", "rank"), [(0, 0), (4, 0), (0, 4)])
def test_nothing_changes_unless_the_configuration_allows_it(loras: int, rank: int) -> None:
    async def work() -> None:
        settings = replace(SETTINGS, max_loras=loras, max_rank=rank)
        registry = AdapterRegistry(settings, BASE, Engine())
        for change in (registry.load("a", Path("/a")), registry.unload("fixed")):
            with pytest.raises(WrongState, match="maxLoras and maxLoraRank"):
                await change
        assert dict(registry.loaded) == {"fixed": "fixed"}

    run(work())


# -- the list of models --


def test_adapters_follow_the_base_model() -> None:
    info = replace(model_info(BASE), adapters={"a": "dir-a", "b": "dir-b"})
    cards = json.loads(models_api.model_list(info))["data"]
    shown = [(card["id"], card["root"], card["parent"]) for card in cards]
    assert shown == [(BASE, BASE, None), ("a", "dir-a", BASE), ("b", "dir-b", BASE)]
    for card in cards:
        assert json.loads(models_api.model_card(info, card["id"])) == card
    with pytest.raises(NotFound):
        models_api.model_card(info, "dir-a")
    with pytest.raises(NotFound):
        models_api.check_served(info, "a")


@pytest.mark.parametrize("value", [None, "", "other", 7, True, ["a"], {"a": 1}])
def test_a_model_must_be_named(value: Any) -> None:
    info = replace(model_info(BASE), adapters={"a": "dir-a"})
    with pytest.raises(
        InvalidRequest, match='must be "llama" or the name of a loaded adapter; GET /v1/models'
    ):
        adapter_of_model(Fields({"model": value}), info)
    assert adapter_of_model(Fields({"model": BASE}), info) == ""


@pytest.mark.parametrize("value", [None, "None", BASE])
def test_adapter_ids_of_the_base_model(value: Any) -> None:
    info = replace(model_info(BASE), adapters={"a": "dir-a"})
    assert adapter_of_id(Fields({"adapter_id": value}), info) == ""


@pytest.mark.parametrize("value", ["", "a b", "x" * 257, 7, False, ["a"], "other", "A"])
def test_adapter_ids_that_are_refused(value: Any) -> None:
    info = replace(model_info(BASE), adapters={"a": "dir-a"})
    with pytest.raises(InvalidRequest, match="adapter_id"):
        adapter_of_id(Fields({"adapter_id": value}), info)


# -- every instance --


class Leader:
    """The other end of an instance's channels."""

    def __init__(self, place: Path, number: int, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self.wire = InstanceWire(
            instance=number,
            directory=str(place),
            prompt_ring=create_ring(f"t_prompt{number}", 2, sizes.prompt_slot_bytes(16)),
            token_ring=create_ring(f"t_token{number}", 2, sizes.TOKEN_SLOT_BYTES),
        )
        self.commands = Channel(context, zmq.PULL, self.wire.command_address(0), bind=True)
        self.events = Channel(context, zmq.PUSH, self.wire.event_address(0))

    async def command(self) -> object:
        while not (found := list(self.commands.receive())):
            await asyncio.sleep(0.001)
        (message,) = found
        return message


@asynccontextmanager
async def engine_of_two(place: Path) -> AsyncIterator[tuple[EngineClient, list[Leader]]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        leaders = [Leader(place, number, context) for number in range(2)]
        engine = EngineClient([leader.wire for leader in leaders], context, lambda has: has, lambda *_: None)
        for leader in leaders:
            engine.open_instance(leader.wire.instance, 0)
            assert leader.events.wait_connected(5.0)
            leader.events.send(EngineReady(leader.wire.instance, 9, 9, 9, 9, "cpu", "float32"))
        await engine.wait_ready()
        yield engine, leaders
    finally:
        context.destroy(linger=0)


@pytest.mark.parametrize("faults", [("", ""), ("", "too wide"), ("too wide", "")])
def test_a_change_is_done_when_every_instance_has_answered(tmp_path: Path, faults: tuple[str, str]) -> None:
    async def work() -> None:
        async with engine_of_two(tmp_path) as (engine, leaders):
            change = asyncio.create_task(engine.change_adapters(LoraLoad("a", "/a")))
            for leader, fault in zip(leaders, faults, strict=True):
                assert await leader.command() == LoraLoad("a", "/a")
                assert not change.done()
                leader.events.send(LoraDone("stranger", "nobody waits for this"))
                leader.events.send(LoraDone("a", fault))
            assert await change == "".join(faults)

    run(work())


def test_a_change_ends_with_an_instance_that_dies(tmp_path: Path) -> None:
    async def work() -> None:
        async with engine_of_two(tmp_path) as (engine, leaders):
            change = asyncio.create_task(engine.change_adapters(LoraUnload("a")))
            await leaders[1].command()
            engine.close_instance(1, final=True)
            with pytest.raises(EngineFailed):
                await change
            with pytest.raises(ServiceUnavailable):
                await engine.change_adapters(LoraUnload("b"))

    run(work())
