"""Level 1b: our own platform, attention and models traced against the operators' schemas. See README.md."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from scripts import quantize
from scripts.extract_npu_schemas import OPERATORS
from scripts.write_random_model import Shape, write_model
from tests.npu_schemas.pretend_npu import TABLE
from tests.worker.conftest import write_checkpoint

REPO = Path(__file__).resolve().parents[2]
STEPS = {"prefill": 2, "chunk": 3, "decode one": 1, "decode": 3}  # with their rows
SCHEMES = ("w8a8", "w8a8_dynamic", "w8a16")
VOCABULARY = 600
FAMILIES = ("mistral-window", "qwen3", "llama-mqa-bias-headdim")
MOST_LAUNCHES = 11  # of a decoder layer that decodes; one more is a lost fusion, or a copy nobody asked for

pytestmark = pytest.mark.timeout(120)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.npu_schemas.trace", *arguments]
    return subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=110)


def shape(layers: int) -> Shape:
    return Shape("qwen2", layers, 128, heads=4, kv_heads=2, intermediate=96, vocab=VOCABULARY, tied=True)


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By name of the checkpoint, then by kind of step; all from one process."""
    home = tmp_path_factory.mktemp("npu")
    texts = home / "texts"
    texts.write_text(" badebi dafudi gika")
    for layers in (1, 2):
        write_model(shape(layers), home / f"layers{layers}")
    for scheme in SCHEMES:
        calibrate = ["--calibrate", str(texts)] if scheme == "w8a8" else []
        source = ["--model", str(home / "layers1"), "--out", str(home / scheme), "--scheme", scheme]
        assert quantize.main([*source, *calibrate]) == 0
    for family in FAMILIES:
        write_checkpoint(home / family, family)
    names = ["layers1", "layers2", *SCHEMES, *FAMILIES]
    wanted = [f"bfloat16:{name}={home / name}" for name in names]
    wanted += [f"float16:{name}={home / name}" for name in ("layers1", *SCHEMES)]
    result = run(*wanted)
    assert result.returncode == 0, result.stderr[-2000:]
    told: dict[str, Any] = json.loads(result.stdout)
    return told


def launches(steps: dict[str, Any], step: str) -> Counter[str]:
    return Counter(steps[step]["launches"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["layers1", *SCHEMES])
def test_every_kind_of_step_gives_logits_on_the_device(traces: dict[str, Any], name: str, dtype: str) -> None:
    steps = traces[f"{dtype}:{name}"]
    assert steps.keys() == STEPS.keys()
    for step, rows in STEPS.items():
        told = {part: steps[step][part] for part in ("logits", "dtype", "device")}
        assert told == {"logits": [rows, VOCABULARY], "dtype": f"torch.{dtype}", "device": "npu:0"}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_gets_through(traces: dict[str, Any], name: str) -> None:
    steps = traces[f"bfloat16:{name}"]
    assert [steps[step]["logits"][0] for step in STEPS] == list(STEPS.values())


@pytest.mark.parametrize("step", STEPS)
def test_a_layer_launches_no_more_than_its_operators(traces: dict[str, Any], step: str) -> None:
    """What a second layer adds, so that what happens once a step does not count."""
    layer = launches(traces["bfloat16:layers2"], step)
    layer.subtract(launches(traces["bfloat16:layers1"], step))
    assert +layer == {
        "aten.linear.default": 4,
        "npu.npu_add_rms_norm.default": 2,
        "npu.npu_mrope.default": 1,
        "npu.npu_scatter_pa_kv_cache.default": 1,
        "npu.npu_fused_infer_attention_score.default": 1,
        "npu.npu_swiglu.default": 1,
        # values are a slice of the joint product, and have to be dense to be stored
        **({} if step == "decode one" else {"aten.contiguous.default": 1}),
    }
    assert layer.total() <= MOST_LAUNCHES


@pytest.mark.parametrize(
    ("scheme", "operators"),
    [
        ("w8a8", {"npu_quantize": 4, "npu_quant_matmul": 4}),
        ("w8a8_dynamic", {"npu_dynamic_quant": 4, "npu_quant_matmul": 4}),
        ("w8a16", {"npu_weight_quant_batchmatmul": 4}),
    ],
)
def test_quantised_layers_use_the_operators_of_their_scheme(
    traces: dict[str, Any], scheme: str, operators: dict[str, int]
) -> None:
    counts = launches(traces[f"bfloat16:{scheme}"], "decode")
    assert {f"npu.{name}.default": count for name, count in operators.items()}.items() <= counts.items()
    assert counts["aten.linear.default"] == 1, "the head alone stays as it was"


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        ("wrong keyword", "eps"),
        ("missing argument", "gamma"),
        ("by place, not by keyword", "npu_dynamic_quant"),
        ("unknown operator", "npu_rms_norms"),
        ("other device", "device"),
        ("other shape", "gamma"),
    ],
)
def test_a_wrong_call_is_rejected(traces: dict[str, Any], call: str, complaint: str) -> None:
    assert traces["calls"]["right"] == ""
    assert complaint in traces["calls"][call]


def test_the_table_is_what_the_script_writes() -> None:
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    assert list(table["schemas"]) == sorted(OPERATORS)
    assert table["torch_npu"] == "2.13.0"


def test_every_operator_we_call_is_in_the_table() -> None:
    """Found by name in the sources: one that no trace reaches must be known too."""
    called: set[str] = set()
    for file in (REPO / "worker").rglob("npu*.py"):
        called |= set(re.findall(r"torch\.ops\.npu\.(\w+)", file.read_text(encoding="utf-8")))
    assert "npu_rms_norm" in called
    assert sorted(called - set(json.loads(TABLE.read_text(encoding="utf-8"))["schemas"])) == []
