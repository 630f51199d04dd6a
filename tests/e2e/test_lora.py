"""LoRA adapters on the running server: chosen in every dialect, loaded and unloaded while it runs."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.harness import TINY_MODEL, Answer, Daemon, Installation, Json, eventually, sse_payloads
from tests.lora_adapters import edit_config, merged, write_adapter

BASE = "mindie-tiny"
PROMPT = "Once upon a time"
NEW = 16
MAX_LORAS, MAX_RANK = 3, 16


class Place:
    """A daemon with the static adapter `fixed`, directories of others, and what transformers says of each."""

    def __init__(self, installation: Installation, folder: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.set_num_threads(1)
        self.folder = folder
        self.paths = {name: folder / f"dir-of-{name}" for name in ("fixed", "guest")}
        for seed, path in enumerate(self.paths.values()):
            write_adapter(TINY_MODEL, path, rank=8, strength=0.5, seed=seed)
        write_adapter(TINY_MODEL, folder / "wide", rank=MAX_RANK + 1)
        module = {"name": "fixed", "path": str(self.paths["fixed"]), "baseModelName": BASE}
        deploy = {"LoraModules": [module], "maxLoras": MAX_LORAS, "maxLoraRank": MAX_RANK}
        # two instances: each must have every adapter
        backend = {
            "runtimeConfig": {"dtype": "float32", "cpuThreads": 1},
            "modelInstanceNumber": 2,
            "npuDeviceIds": [[0], [1]],
            "ScheduleConfig": {"cacheBlockSize": 16},
            "ModelDeployConfig": deploy,
        }
        self.daemon = installation.daemon({"BackendConfig": backend})
        self._tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
        base = AutoModelForCausalLM.from_pretrained(TINY_MODEL, dtype=torch.float32).eval()
        self._models = {BASE: base} | {name: merged(base, path) for name, path in self.paths.items()}
        self._texts: dict[tuple[str, int], str] = {}

    def text(self, name: str, new: int = NEW) -> str:
        """What the named model goes on to say after PROMPT, end of text or not."""
        if (name, new) not in self._texts:
            ids = torch.tensor([self._tokenizer.encode(PROMPT)])
            with torch.inference_mode():
                whole: Any = self._models[name].generate(
                    ids, max_new_tokens=new, do_sample=False, eos_token_id=None
                )
            answer = whole[0, ids.shape[1] :]
            self._texts[name, new] = self._tokenizer.decode(answer, skip_special_tokens=True)
        return self._texts[name, new]

    def load(self, name: Any, path: Any, **more: Any) -> Answer:
        return self.manage("/v1/load_lora_adapter", {"lora_name": name, "lora_path": path, **more})

    def unload(self, name: Any) -> Answer:
        return self.manage("/v1/unload_lora_adapter", {"lora_name": name})

    def manage(self, path: str, body: Json | bytes) -> Answer:
        return self.daemon.request("POST", path, body, port=self.daemon.management_port)

    def listed(self) -> list[str]:
        return [card["id"] for card in self.daemon.get("/v1/models").json()["data"]]


@pytest.fixture(scope="module")
def place(installation: Installation, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    place = Place(installation, tmp_path_factory.mktemp("loras"))
    place.daemon.start().wait_ready()
    yield place
    assert place.daemon.stop() == 0, place.daemon.stderr


@pytest.fixture
def guest(place: Place) -> Iterator[str]:
    """An adapter that is loaded for one test."""
    answer = place.load("guest", str(place.paths["guest"]))
    assert answer.status == 200, answer.body
    yield "guest"
    if "guest" in place.listed():
        assert place.unload("guest").status == 200


# -- each dialect's way to name an adapter, and where its answer has the text --

Ask = Callable[[Daemon, str], str]


def completions(daemon: Daemon, name: str) -> str:
    body = {"model": name, "prompt": PROMPT, "max_tokens": NEW, "temperature": 0, "ignore_eos": True}
    answer = daemon.post("/v1/completions", body).json()
    assert answer["model"] == name
    return str(answer["choices"][0]["text"])


def streamed_completions(daemon: Daemon, name: str) -> str:
    body = {"model": name, "prompt": PROMPT, "max_tokens": NEW, "temperature": 0, "ignore_eos": True}
    *payloads, end = daemon.frames("/v1/completions", {**body, "stream": True})
    assert end == "[DONE]"
    frames = [json.loads(payload) for payload in payloads]
    assert {frame["model"] for frame in frames} == {name}
    return "".join(frame["choices"][0]["text"] for frame in frames)


def vllm(daemon: Daemon, name: str) -> str:
    body = {"prompt": PROMPT, "max_tokens": NEW, "temperature": 0, "ignore_eos": True}
    (text,) = daemon.post("/generate", {**body, "model": name}).json()["text"]
    return str(text)[len(PROMPT) :]


def _parameters(name: str) -> Json:
    return {"max_new_tokens": NEW, "adapter_id": name}


def tgi(daemon: Daemon, name: str) -> str:
    body = {"inputs": PROMPT, "parameters": _parameters(name)}
    return str(daemon.post("/generate", body).json()["generated_text"])


def tgi_stream(daemon: Daemon, name: str) -> str:
    body = {"inputs": PROMPT, "parameters": _parameters(name)}
    return str(json.loads(daemon.frames("/generate_stream", body)[-1])["generated_text"])


def tgi_root(daemon: Daemon, name: str) -> str:
    body = {"inputs": PROMPT, "parameters": _parameters(name)}
    return str(daemon.post("/", body).json()[0]["generated_text"])


def native(daemon: Daemon, name: str) -> str:
    body = {"inputs": PROMPT, "parameters": _parameters(name)}
    return str(daemon.post("/infer", body).json()["generated_text"])


DIALECTS: dict[str, Ask] = {
    ask.__name__: ask for ask in (completions, streamed_completions, vllm, tgi, tgi_stream, tgi_root, native)
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_gets_the_merged_models_text(place: Place, guest: str, dialect: str) -> None:
    ask = DIALECTS[dialect]
    texts = {name: ask(place.daemon, name) for name in (BASE, "fixed", guest)}
    assert len(set(texts.values())) == 3
    for name, text in texts.items():
        # dialects without ignore_eos may end early
        want = place.text(name)
        assert text.strip() and want.strip().startswith(text.strip()), name
        if dialect in ("completions", "streamed_completions"):
            assert text == want


def test_chat(place: Place, guest: str) -> None:
    body = {"messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": NEW, "temperature": 0}
    answers = {
        name: place.daemon.post("/v1/chat/completions", {**body, "model": name}).json()
        for name in (BASE, "fixed", guest)
    }
    for name, answer in answers.items():
        assert answer["model"] == name
    assert len({answer["choices"][0]["message"]["content"] for answer in answers.values()}) == 3
    frames = place.daemon.frames("/v1/chat/completions", {**body, "model": guest, "stream": True})
    streamed = [json.loads(frame) for frame in frames[:-1]]
    text = "".join(frame["choices"][0]["delta"]["content"] for frame in streamed)
    assert {frame["model"] for frame in streamed} == {guest}
    assert text == answers[guest]["choices"][0]["message"]["content"]


def test_several_choices_and_beams(place: Place) -> None:
    body = {"model": "fixed", "prompt": PROMPT, "max_tokens": NEW, "ignore_eos": True}
    drawn = place.daemon.post("/v1/completions", {**body, "n": 3, "temperature": 1e-3, "seed": 1}).json()
    assert {choice["text"] for choice in drawn["choices"]} == {place.text("fixed")}
    beams = place.daemon.post("/v1/completions", {**body, "n": 3, "use_beam_search": True}).json()
    other = place.daemon.post(
        "/v1/completions", {**body, "model": BASE, "n": 3, "use_beam_search": True}
    ).json()
    assert [c["text"] for c in beams["choices"]] != [c["text"] for c in other["choices"]]


def test_all_at_once(place: Place, guest: str) -> None:
    """Batches that mix the base model and both adapters, on both instances."""
    names = [BASE, "fixed", guest] * 8
    with ThreadPoolExecutor(len(names)) as pool:
        texts = list(pool.map(lambda name: completions(place.daemon, name), names))
    assert texts == [place.text(name) for name in names]


def test_the_base_model_by_its_other_names(place: Place) -> None:
    want = completions(place.daemon, BASE)
    body: Json = {"prompt": PROMPT, "max_tokens": NEW, "temperature": 0, "ignore_eos": True}
    for more in ({}, {"model": None}, {"model": "None"}, {"model": BASE}):
        (text,) = place.daemon.post("/generate", {**body, **more}).json()["text"]
        assert text.endswith(want.strip())
    for more in ({}, {"adapter_id": None}, {"adapter_id": "None"}, {"adapter_id": BASE}):
        parameters = {"max_new_tokens": NEW, **more}
        text = place.daemon.post("/infer", {"inputs": PROMPT, "parameters": parameters}).json()
        assert want.startswith(text["generated_text"])


UNKNOWN: dict[str, tuple[str, Callable[[Any], Json]]] = {
    "chat": (
        "/v1/chat/completions",
        lambda name: {"model": name, "messages": [{"role": "user", "content": "x"}]},
    ),
    "completions": ("/v1/completions", lambda name: {"model": name, "prompt": "x"}),
    "vllm": ("/generate", lambda name: {"model": name, "prompt": "x"}),
    "tgi": ("/generate", lambda name: {"inputs": "x", "parameters": {"adapter_id": name}}),
    "tgi stream": ("/generate_stream", lambda name: {"inputs": "x", "parameters": {"adapter_id": name}}),
    "tgi root": ("/", lambda name: {"inputs": "x", "parameters": {"adapter_id": name}}),
    "infer": ("/infer", lambda name: {"inputs": "x", "parameters": {"adapter_id": name}}),
    "infer_token": ("/infer_token", lambda name: {"input_id": [5], "parameters": {"adapter_id": name}}),
}


@pytest.mark.parametrize("dialect", UNKNOWN)
def test_unknown_names_are_refused(place: Place, dialect: str) -> None:
    path, body = UNKNOWN[dialect]
    for name in ("stranger", "", "../fixed", "fixed\0", "FIXED", "x" * 300, 7, ["fixed"]):
        answer = place.daemon.post(path, body(name))
        assert answer.status == 422, (name, answer.body)
        error = answer.json()["error"]
        assert "adapter_id" in error or "`model`" in error
    error = place.daemon.post(path, body("stranger")).json()["error"]
    assert BASE in error and "loaded adapter" in error and "/v1/models" in error


def test_triton_has_no_adapters(place: Place) -> None:
    body = {"text_input": "x", "parameters": {"max_new_tokens": 2}}
    assert place.daemon.post("/v2/models/fixed/generate", body).status == 404
    assert place.daemon.get("/v2/models/fixed").status == 404


# -- coming and going --


def test_the_list_of_models(place: Place) -> None:
    base, fixed = place.daemon.get("/v1/models").json()["data"]
    assert (base["id"], base["root"], base["parent"]) == (BASE, BASE, None)
    assert (fixed["id"], fixed["root"], fixed["parent"]) == ("fixed", "dir-of-fixed", BASE)
    assert fixed["created"] == base["created"] and fixed["max_model_len"] == base["max_model_len"]
    assert place.daemon.get("/v1/models/fixed").json() == fixed
    assert place.daemon.get("/v1/models/guest").status == 404
    path = str(place.paths["guest"])
    answer = place.load("guest", path, master_model=BASE)
    assert answer.status == 200 and answer.json() == {"message": "adapter guest is loaded"}
    assert place.listed() == [BASE, "fixed", "guest"]
    assert place.daemon.get("/v1/models/guest").json()["root"] == "dir-of-guest"
    assert place.load("guest", path + "/").status == 200  # it is loaded from there already
    answer = place.unload("guest")
    assert answer.status == 200 and answer.json() == {"message": "adapter guest is unloaded"}
    assert place.listed() == [BASE, "fixed"]
    assert place.unload("guest").status == 404


def test_a_used_adapter_stays_for_its_requests_and_is_refused_to_new_ones(place: Place, guest: str) -> None:
    new = 400
    body = {"model": guest, "prompt": PROMPT, "max_tokens": new, "temperature": 0, "ignore_eos": True}
    with place.daemon.streaming("/v1/completions", {**body, "stream": True}) as response:
        first = response.readline()
        assert first.startswith(b"data: ")
        answers: list[Answer] = []
        unloading = threading.Thread(target=lambda: answers.append(place.unload(guest)))
        unloading.start()
        eventually(lambda: guest not in place.listed(), 10.0, "adapter out of the list")
        refused = place.daemon.post("/v1/completions", body)
        assert refused.status == 422 and "loaded adapter" in refused.json()["error"]
        again = place.load(guest, str(place.paths["guest"]))
        rest = response.read()
    unloading.join()
    payloads = sse_payloads(first + rest)
    text = "".join(json.loads(payload)["choices"][0]["text"] for payload in payloads[:-1])
    assert text == place.text(guest, new)
    assert answers[0].status == 200
    # loading it again waits for nobody: it is refused as long as the old one is there
    assert again.status in (200, 400)
    if again.status == 400:
        assert "being loaded or unloaded" in again.json()["error"]


BAD_NAMES: list[Any] = [None, "", "a b", "a/b", "..", "a.b", "é", "x" * 257, 7, "None"]
BAD_PATHS: list[Any] = [None, "", 7, "../x", "/a/../b", "..", "a/..", "x" * 5000, "a\0"]
NO_OBJECTS = [b"", b"{", b"[]", b"null", b"\xff"]


def test_bad_bodies(place: Place) -> None:
    bodies: list[Json | bytes] = [
        *NO_OBJECTS,
        *({"lora_name": name, "lora_path": "x"} for name in BAD_NAMES),
        *({"lora_name": "x", "lora_path": path} for path in BAD_PATHS),
        *({"lora_name": "x", "lora_path": "x", "master_model": other} for other in ("other", 7)),
    ]
    for body in bodies:
        answer = place.manage("/v1/load_lora_adapter", body)
        assert answer.status == 422, (body, answer.body)
        assert answer.json()["error_type"] == "Input Validation Error"
    for body in [*NO_OBJECTS, *({"lora_name": name} for name in BAD_NAMES)]:
        assert place.manage("/v1/unload_lora_adapter", body).status == 422, body
    assert place.listed() == [BASE, "fixed"]


def test_what_cannot_be_loaded(place: Place, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    write_adapter(TINY_MODEL, broken)
    edit_config(broken, r=5)
    cases = {
        str(tmp_path / "gone"): "cannot be read: No such file or directory",
        str(TINY_MODEL): "adapter_config.json: cannot be read",
        "relative/to/the/installation": str(place.daemon.root / "relative/to/the/installation"),
        str(broken): "does not fit the model",
        str(place.folder / "wide"): f"rank {MAX_RANK + 1} is above maxLoraRank {MAX_RANK}",
    }
    for path, part in cases.items():
        answer = place.load("x", path)
        assert answer.status == 400 and answer.json()["type"] == "Bad Request", answer.body
        assert part in answer.json()["error"]
    for name, path in (("fixed", "guest"), (BASE, "guest")):
        answer = place.load(name, str(place.paths[path]))
        assert answer.status == 400 and name in answer.json()["error"]
    assert place.unload("x").status == 404
    assert place.unload(BASE).status == 404
    assert place.listed() == [BASE, "fixed"]
    assert completions(place.daemon, "fixed") == place.text("fixed")


def test_the_table_has_an_end(place: Place, guest: str) -> None:
    path = str(place.paths["guest"])
    assert place.load("third", path).status == 200
    answer = place.load("fourth", path)
    assert answer.status == 400 and "maxLoras" in answer.json()["error"]
    assert place.unload("third").status == 200
    assert place.load("fourth", path).status == 200
    assert place.unload("fourth").status == 200


def test_a_static_adapter_can_go_and_come_back(place: Place) -> None:
    assert place.unload("fixed").status == 200
    assert place.listed() == [BASE]
    assert place.load("fixed", str(place.paths["fixed"])).status == 200
    assert completions(place.daemon, "fixed") == place.text("fixed")


def test_other_methods(place: Place) -> None:
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
        answer = place.daemon.manage(path)
        assert answer.status == 405 and answer.headers["allow"] == "POST"
