"""A model directory is hostile data: however damaged, the start is refused in lines that say what is wrong.

The mutator has fixed seeds: the same files are made in every run.
"""

from __future__ import annotations

import importlib
import json
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from daemon.config_report import ConfigError
from endpoint.tokenizer import TokenizerPool
from engine.errors import EXIT_CONFIG, EXIT_INIT, StartupError
from engine.weight_files import INDEX, SINGLE, WeightFault, read_header, read_weights
from tests.daemon.config_home import Home
from tests.harness import Daemon
from tests.worker.conftest import Harness

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
write_random_model = importlib.import_module("write_random_model")

MakeDaemon = Callable[..., Daemon]
Header = dict[str, Any]

SEED = 20260131
CUTS = 20  # offsets at which a file is cut
DAMAGES = 8  # spoilt copies of a file
TEXTS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model that starts."""
    folder = tmp_path_factory.mktemp("whole") / "model"
    write_random_model.write_model(write_random_model.SHAPES["llama-tiny"], folder, seed=3)
    for path in (folder, *folder.iterdir()):
        path.chmod(0o750 if path.is_dir() else 0o640)
    return folder


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path / "home")
    home.server["httpsEnabled"] = False  # keys are checked at length whenever there is a finding
    home.model["modelWeightPath"] = str(tmp_path / "model")
    return home


def start(model: Path, home: Home, *, load: bool = True) -> tuple[int, str]:
    """Exit code and message of a start, (0, "") when it would serve; any other exception is a traceback.

    First what the parent checks, then what the endpoint and (with `load`) the worker do with the directory.
    """
    try:
        home.load()
        tokenizer = TokenizerPool(model, threads=1)
        if load:
            tokenizer.check_fits(Harness(model).runner.vocab_size)
    except StartupError as error:
        return error.exit_code, str(error)
    return 0, ""


def damaged(raw: bytes, rng: random.Random) -> bytes:
    """A few bytes of the first kilobyte, or anywhere, replaced, left out or put in."""
    copy = bytearray(raw)
    for _ in range(rng.choice((1, 1, 3, 8))):
        at = rng.randrange(1 + (min(len(copy), 1000) if rng.random() < 0.7 else len(copy)))
        match rng.randrange(3):
            case 0:
                copy[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                del copy[at : at + rng.choice((1, 2, 50))]
            case _:
                copy[at:at] = rng.choice((b"\0", b"9" * 30, b"[" * 2000, b"\xff\xfe", b'"', b"}", b"-1e999"))
    return bytes(copy)


def mutations(file: Path) -> Iterator[tuple[str, bytes]]:
    raw, rng = file.read_bytes(), random.Random(f"{SEED}:{file.name}")
    for number in range(CUTS):
        cut = number if number < 4 else rng.randrange(len(raw))
        yield f"cut at {cut}", raw[:cut]
    for number in range(DAMAGES):
        yield f"damage {number}", damaged(raw, rng)


@pytest.mark.parametrize("name", [SINGLE, *TEXTS])
def test_F14_F15_A29_a_damaged_file_is_refused_or_harmless(model: Path, home: Home, name: str) -> None:
    """Cut at 20 offsets and spoilt in other ways: an exit code and lines that name it, or it serves."""
    file = model / name
    refused = 0
    for what, content in list(mutations(file)):
        file.write_bytes(content)
        code, message = start(model, home, load=name in (SINGLE, "config.json"))
        assert code in (0, EXIT_CONFIG, EXIT_INIT), (what, message)
        if code:
            refused += 1
            assert str(model) in message or "chat template" in message, (what, message)
            assert all(len(line) < 1000 for line in message.splitlines()), (what, message)
        if what.startswith("cut") and name == SINGLE:
            assert code == EXIT_CONFIG, (what, message)
    assert refused >= CUTS - 2  # what is left of a cut may happen to be whole: {}


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", SINGLE])
def test_F14_F15_a_missing_file_is_named_with_the_nearest(model: Path, home: Home, name: str) -> None:
    (model / name).rename(model / f"{name}.part")
    code, message = start(model, home)
    assert code == EXIT_CONFIG
    assert f"(there is {name}.part)" in message


def test_F14_everything_wrong_with_a_directory_is_told_at_once(model: Path, home: Home) -> None:
    weights = (model / SINGLE).read_bytes()
    (model / SINGLE).write_bytes(weights[:-100])
    (model / "tokenizer.json").write_bytes((model / "tokenizer.json").read_bytes()[:-100])
    (model / "config.json").write_text('{"vocab_size": "many"}')
    (model / "generation_config.json").write_text("[]")
    with pytest.raises(ConfigError) as caught:
        home.load()
    findings = caught.value.findings
    for part in (
        f"{SINGLE}: ", "cut short, or not copied to its end", "tokenizer.json has", "cut short: expected }",
        'no positive "vocab_size"', 'no string "model_type"',
        "generation_config.json must hold a JSON object",
    ):  # fmt: skip
        assert any(part in finding for finding in findings), (part, findings)


# --- headers ---


def rewrite(file: Path, change: Callable[[Header], None]) -> None:
    """The file with another header and the same data."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def overlap(header: Header) -> None:
    first, second = (
        name for name in header if name != "__metadata__" and "layernorm" in name and "0" in name
    )
    header[second]["data_offsets"] = header[first]["data_offsets"]


def out_of_file(header: Header) -> None:
    begin, end = header[NORM]["data_offsets"]
    header[NORM]["data_offsets"] = [begin + 2**40, end + 2**40]


def wrap(header: Header) -> None:
    header[NORM] |= {"shape": [2**62, 4], "data_offsets": [0, 0]}


def enormous_vocabulary(header: Header) -> None:
    header["lm_head.weight"]["shape"] = [10**9, 96]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (overlap, "overlap"),
        (out_of_file, "belong to no tensor"),
        (wrap, "hold 0 bytes, expected"),
        (enormous_vocabulary, "expected 192000000000 for BF16 [1000000000, 96]"),
        (lambda header: header[NORM].update(dtype="F7"), "dtype 'F7' is none of"),
        (lambda header: header[NORM].update(shape=[True]), "must be a list of whole numbers"),
        (lambda header: header[NORM].update(shape=[-96]), "must be a list of whole numbers"),
        (lambda header: header[NORM].update(shape=[1] * 100), "at most 16"),
        (lambda header: header[NORM].update(data_offsets=[9, 3]), "must be [begin, end]"),
        (lambda header: header[NORM].update(data_offsets=[0, 2**63]), "must be [begin, end]"),
        (lambda header: header.update({NORM: 3}), "its entry must be an object"),
        (lambda header: header.pop("lm_head.weight"), "belong to no tensor"),
    ],
)
def test_A29_numbers_of_a_header_are_held_against_the_file(
    model: Path, change: Callable[[Header], Any], words: str
) -> None:
    rewrite(model / SINGLE, change)
    with pytest.raises(WeightFault) as caught:
        read_weights(model)
    assert str(model / SINGLE) in str(caught.value) and words in str(caught.value)


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**63, 2**64 - 1])
def test_A29_the_length_of_a_header_is_held_against_the_file(model: Path, length: int) -> None:
    file = model / SINGLE
    file.write_bytes(length.to_bytes(8, "little") + file.read_bytes()[8:])
    with pytest.raises(WeightFault, match=str(file)):
        read_header(file)


def test_A29_a_header_nested_without_end_is_no_header(tmp_path: Path) -> None:
    text = b'{"a":' * 100_000
    file = tmp_path / SINGLE
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(WeightFault, match="not valid JSON"):
        read_header(file)


def test_A29_weights_of_a_dtype_that_is_not_computed_with_are_refused(model: Path, home: Home) -> None:
    tensors = load_file(model / SINGLE)
    tensors[NORM] = tensors[NORM].to(torch.int16)
    save_file(tensors, model / SINGLE)
    code, message = start(model, home)
    assert code == EXIT_INIT
    assert f"{NORM} in {SINGLE} is stored as I16, expected one of F64, F32, F16, BF16" in message


def test_A29_an_index_does_not_lead_out_of_its_directory(model: Path) -> None:
    (model / INDEX).write_text(json.dumps({"weight_map": {NORM: f"../model/{SINGLE}"}}))
    with pytest.raises(WeightFault, match="the name of a file beside it"):
        read_weights(model)


def test_F14_all_shards_are_judged_at_once(model: Path, home: Home) -> None:
    file_of = {NORM: "a.safetensors", "x": "b.safetensors", "y": "model-00001-of-00002.safetensors"}
    (model / INDEX).write_text(json.dumps({"weight_map": file_of}))
    save_file({"other": torch.ones(1)}, model / "a.safetensors")
    (model / "b.safetensors").write_bytes(b"\xff" * 64)
    (model / SINGLE).rename(model / "model-00001-of-0002.safetensors")
    code, message = start(model, home)
    assert code == EXIT_CONFIG
    for part in (
        f"{model / 'a.safetensors'} lacks {NORM}", f"{model / 'b.safetensors'}: a header of",
        "model-00001-of-00002.safetensors (there is model-00001-of-0002.safetensors)",
    ):  # fmt: skip
        assert part in message


# --- vocabulary ---


def test_F15_a_tokenizer_of_a_larger_model_is_refused(model: Path, home: Home) -> None:
    tensors = load_file(model / SINGLE)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:1000].clone()
    save_file(tensors, model / SINGLE)
    config = model / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": 1000}))
    code, message = start(model, home)
    assert code == EXIT_INIT
    assert "ids up to 2047" in message and "vocab_size of 1000" in message


def test_F15_a_config_of_a_larger_model_is_refused(model: Path, home: Home) -> None:
    config = model / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": 10**9}))
    code, message = start(model, home)
    assert code == EXIT_INIT
    assert "lm_head.weight in model.safetensors is [2048, 96], expected [1000000000, 96]" in message


# --- the real daemon ---


def test_F14_A29_the_daemon_ends_with_one_code_and_no_traceback(make_daemon: MakeDaemon, model: Path) -> None:
    rewrite(model / SINGLE, overlap)
    daemon = make_daemon(model=model).start()
    assert daemon.wait(30) == EXIT_CONFIG
    assert "overlap" in daemon.stderr and str(model / SINGLE) in daemon.stderr
    assert "Traceback" not in daemon.stderr and "started" not in daemon.stderr


def test_A28_python_of_a_model_is_never_imported(
    make_daemon: MakeDaemon, model: Path, tmp_path: Path
) -> None:
    """`auto_map` names code beside the weights: the model is served without it, or not at all."""
    trace = tmp_path / "imported"
    for name in ("modeling_own", "configuration_own", "tokenization_own"):
        (model / f"{name}.py").write_text(f"open({str(trace)!r}, 'w').close()\nOwn = object\n")
    auto_map = {
        "AutoConfig": "configuration_own.Own",
        "AutoModelForCausalLM": "modeling_own.Own",
        "AutoTokenizer": ["tokenization_own.Own", None],
    }
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps({**content, "auto_map": auto_map}))
    daemon = make_daemon(model=model).start().wait_ready()
    body = {"model": "mindie-tiny", "prompt": "a", "max_tokens": 2}
    assert daemon.post("/v1/completions", body).status == 200
    assert daemon.stop() == 0
    assert not trace.exists()


def test_A28_pickled_weights_are_refused_with_a_way_out(model: Path, home: Home) -> None:
    (model / SINGLE).rename(model / "pytorch_model.bin")
    code, message = start(model, home)
    assert code == EXIT_CONFIG
    assert "pytorch_model.bin" in message and "safe_serialization=True" in message
