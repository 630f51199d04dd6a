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
from endpoint.instance_choice import InstanceChoice
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

    async def load_adapter(self, name: str, path: str) -> str:
        self.commands.append(LoraLoad(name, path))
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        return self.fault

    async def unload_adapter(self, name: str) -> None:
        self.commands.append(LoraUnload(name))
        await self.gate.wait()


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

    def __init__(
        self, place: Path, number: int, context: zmq.Context[zmq.Socket[bytes]], generation: int = 0
    ) -> None:
        self.wire = InstanceWire(
            instance=number,
            directory=str(place),
            prompt_ring=create_ring(f"t_prompt{number}", 2, sizes.prompt_slot_bytes(16)),
            token_ring=create_ring(f"t_token{number}", 2, sizes.TOKEN_SLOT_BYTES),
        )
        self.commands = Channel(context, zmq.PULL, self.wire.command_address(generation), bind=True)
        self.events = Channel(context, zmq.PUSH, self.wire.event_address(generation))
        self.context = context

    def greet(self) -> None:
        assert self.events.wait_connected(5.0)
        self.events.send(EngineReady(self.wire.instance, 9, 9, 9, 9, "cpu", "float32"))

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
        wires = [leader.wire for leader in leaders]
        choice = InstanceChoice(128, 200, prefix_cache=False)
        engine = EngineClient(wires, context, lambda has: has, lambda *_: None, choice)
        for leader in leaders:
            engine.open_instance(leader.wire.instance, 0)
            leader.greet()
        await engine.wait_ready()
        yield engine, leaders
    finally:
        context.destroy(linger=0)


@pytest.mark.parametrize("faults", [("", ""), ("", "too wide"), ("too wide", "")])
def test_a_change_is_done_when_every_instance_has_answered(tmp_path: Path, faults: tuple[str, str]) -> None:
    async def work() -> None:
        async with engine_of_two(tmp_path) as (engine, leaders):
            change = asyncio.create_task(engine.load_adapter("a", "/a"))
            for leader, fault in zip(leaders, faults, strict=True):
                assert await leader.command() == LoraLoad("a", "/a")
                assert not change.done()
                leader.events.send(LoraDone("stranger", "nobody waits for this"))
                leader.events.send(LoraDone("a", fault))
            assert await change == "".join(faults)

    run(work())


def test_a_load_ends_with_an_instance_that_dies_once_all_have_answered(tmp_path: Path) -> None:
    async def work() -> None:
        async with engine_of_two(tmp_path) as (engine, leaders):
            change = asyncio.create_task(engine.load_adapter("a", "/a"))
            await leaders[1].command()
            engine.close_instance(1, final=False)
            await leaders[0].command()
            await asyncio.sleep(0.01)
            assert not change.done()  # what is undone before it is done would be done after it
            leaders[0].events.send(LoraDone("a", ""))
            with pytest.raises(EngineFailed):
                await change
            with pytest.raises(ServiceUnavailable):
                await engine.load_adapter("b", "/b")

    run(work())


def test_F01_an_unloading_needs_nothing_of_an_instance_that_is_not_there(tmp_path: Path) -> None:
    async def work() -> None:
        async with engine_of_two(tmp_path) as (engine, leaders):
            change = asyncio.create_task(engine.unload_adapter("a"))
            for leader in leaders:
                assert await leader.command() == LoraUnload("a")
            engine.close_instance(1, final=False)
            leaders[0].events.send(LoraDone("a", ""))
            await change
            change = asyncio.create_task(engine.unload_adapter("b"))
            assert await leaders[0].command() == LoraUnload("b")
            leaders[0].events.send(LoraDone("b", ""))
            await change

    run(work())


def test_F01_an_instance_that_comes_up_gets_what_has_changed_meanwhile(tmp_path: Path) -> None:
    async def work() -> None:
        async with engine_of_two(tmp_path) as (engine, leaders):
            registry = AdapterRegistry(SETTINGS, BASE, engine)
            engine._wanted_adapters = registry.wanted
            engine.close_instance(1, final=False)
            engine.open_instance(1, 1)
            leaders.append(Leader(tmp_path, 1, leaders[0].context, generation=1))
            leaders[2].greet()
            assert await leaders[2].command() == LoraLoad("fixed", "/loras/fixed")
            unloading = asyncio.create_task(registry.unload("fixed"))
            assert await leaders[0].command() == LoraUnload("fixed")
            leaders[0].events.send(LoraDone("fixed", ""))
            await unloading
            leaders[2].events.send(LoraDone("fixed", ""))
            assert await leaders[2].command() == LoraUnload("fixed")  # it came too late
            assert not registry.loaded and not all(link.serving for link in engine._links)
            leaders[2].events.send(LoraDone("fixed", ""))
            await engine.wait_ready()

    run(work())
