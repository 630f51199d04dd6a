"""--check-config: what a start would refuse and what it would take, without starting."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import quantize
from tests.daemon.config_home import REPO, Home

# what `mindieservice_daemon` does, and then the heavy modules it has loaded
_SCRIPT = (
    "import sys; from daemon.main import main; code = main()\n"
    "heavy = {'torch', 'numpy', 'aiohttp', 'tokenizers', 'transformers'}\n"
    "print(*sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
    "sys.exit(code)"
)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """With certificates, and the model that ships."""
    home = Home(tmp_path)
    home.put_tls_files()
    home.use_real_model()
    return home


def check(home: Home, *arguments: str) -> subprocess.CompletedProcess[str]:
    home.put("conf/config.json", json.dumps(home.document), 0o640)
    return subprocess.run(
        [sys.executable, "-c", _SCRIPT, "--check-config", *arguments],
        cwd=REPO,
        env={**os.environ, "MINDIE_LLM_HOME_PATH": str(home.root), **home.environ},
        capture_output=True,
        text=True,
        timeout=60,
    )


def rows(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """The plan: what stands in the first column -> what stands in the second."""
    return {line[2:16].strip(): line[17:] for line in done.stdout.splitlines() if line.startswith("  ")}


def test_a_good_set_is_valid_and_planned(home: Home) -> None:
    home.backend["runtimeConfig"] = {"deviceType": "cpu", "kvCacheBlockNum": 50}
    done = check(home)
    assert done.returncode == 0, done.stdout
    assert f"{home.file}: valid, 0 errors" in done.stdout.splitlines()[-1]
    plan = rows(done)
    assert plan["business"] == "https://127.0.0.1:1025 (mutual TLS)"
    assert plan["instance 0"] == "1 worker, device 0"
    # 2 (keys, values) x 4 layers x 2 heads x 64 x 2 bytes x 128 tokens
    assert plan["KV block"] == "262144 bytes for 128 tokens"
    assert plan["longest text"] == "2560 tokens take 20 blocks, 5.0 MiB"
    assert plan["KV cache"] == "50 blocks by kvCacheBlockNum, 12.5 MiB"
    assert plan["fits"] == "2 sequences of the longest text at once"
    assert "7.0 MiB as bfloat16 (BF16 in 1 file, Qwen2ForCausalLM)" in plan["weights"]
    assert "are available now" in plan["memory"]


def test_nothing_heavy_is_loaded(home: Home) -> None:
    assert check(home).stderr.strip() == ""


@pytest.mark.parametrize(
    ("runtime", "part"),
    [
        ({"kvCacheBlockNum": 3}, "needs 20 blocks of 128 tokens (5 MiB), but 3 are available"),
        ({"kvCacheMemMiB": 1000000}, "lower kvCacheMemMiB"),
    ],
)
def test_what_does_not_fit_is_a_finding(home: Home, runtime: dict[str, int], part: str) -> None:
    home.backend["runtimeConfig"] = {"deviceType": "cpu", **runtime}
    done = check(home)
    assert done.returncode == 1
    (finding,) = [line for line in done.stdout.splitlines() if line.startswith("[memory] ")]
    assert part in finding


def test_what_does_not_fit_is_told_beside_other_findings(home: Home) -> None:
    home.backend["runtimeConfig"] = {"deviceType": "cpu", "kvCacheBlockNum": 3}
    home.server["port"] = 80
    done = check(home)
    assert "[config] ServerConfig.port=80" in done.stdout and "[memory] KV cache" in done.stdout
    assert "2 errors" in done.stdout.splitlines()[-1]
    home.schedule["cacheBlockSize"] = 0
    done = check(home)
    assert "[memory]" not in done.stdout, "a plan needs what it is made of"


def test_damaged_weights_and_unknown_models_are_findings(home: Home) -> None:
    weights = home.model_dir / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1000])
    assert "bytes of weights, expected" in check(home).stdout
    weights.write_bytes(whole)
    config = home.model_dir / "config.json"
    config.write_text(config.read_text().replace("Qwen2ForCausalLM", "BertModel"))
    done = check(home)
    assert done.returncode == 1
    assert "BertModel" in done.stdout and "LlamaForCausalLM" in done.stdout


def test_what_runs_through_transformers_is_planned_without_it(home: Home) -> None:
    config = home.model_dir / "config.json"
    config.write_text(config.read_text().replace("Qwen2ForCausalLM", "GraniteForCausalLM"))
    home.backend["runtimeConfig"] = {"deviceType": "cpu"}
    done = check(home)
    assert done.returncode == 0, done.stdout
    assert "GraniteForCausalLM through transformers" in rows(done)["weights"]
    assert done.stderr.strip() == "", "nothing heavy is loaded"


def test_a_divided_model_is_planned_by_rank_and_refused_where_it_does_not_divide(home: Home) -> None:
    home.backend["runtimeConfig"] = {"deviceType": "cpu", "kvCacheBlockNum": 50}
    whole = rows(check(home))
    home.backend["npuDeviceIds"] = [[0, 1]]
    home.model["worldSize"] = 2
    done = check(home)
    assert done.returncode == 0 and done.stderr.strip() == "", "nothing heavy is loaded"
    divided = rows(done)
    for row in ("weights", "KV block"):
        part, all_of_it = (float(each[row].split()[0]) for each in (divided, whole))
        assert part == pytest.approx(all_of_it / 2, rel=0.02), row
    assert "2 workers" in divided["memory"]
    home.backend["npuDeviceIds"] = [[0, 1, 2]]
    home.model["worldSize"] = 3
    done = check(home)
    assert done.returncode == 1
    (finding,) = [line for line in done.stdout.splitlines() if line.startswith("[memory]")]
    assert "worldSize=3" in finding and "num_attention_heads 4, no multiple of 3" in finding
    assert finding.endswith("allowed: 1, 2, 4")


def test_quantised_weights_are_counted_as_they_are_held(home: Home) -> None:
    quantize.main(["--model", str(home.model_dir), "--out", str(home.root / "q"), "--scheme", "w8a8_dynamic"])
    home.model["modelWeightPath"] = str(home.root / "q")
    home.backend["runtimeConfig"] = {"deviceType": "cpu"}
    done = check(home)
    assert done.returncode == 0, done.stdout
    # as the worker says, whose layers keep a float32 scale and offset for each row
    assert rows(done)["weights"] == "4.1 MiB as bfloat16 (BF16, F32, I8 in 1 file, Qwen2ForCausalLM)"
    assert done.stderr.strip() == "", "nothing heavy is loaded"
    home.backend["runtimeConfig"]["kvCacheDtype"] = "int8"
    # 2 x 4 layers x 2 heads x (64 + 4) bytes x 128 tokens
    assert rows(check(home))["KV block"] == "139264 bytes for 128 tokens in int8"
    (home.root / "q" / "quant_model_description.json").unlink()
    done = check(home)
    assert done.returncode == 1
    (finding,) = [line for line in done.stdout.splitlines() if line.startswith("[config] ")]
    assert "needs a quant_model_description.json" in finding


def test_what_only_the_device_knows_is_said_to_be_so(home: Home) -> None:
    home.backend["runtimeConfig"] = {"deviceType": "npu"}
    plan = rows(check(home))
    assert "known on the device only" in plan["device type"]
    assert "known on the device only" in plan["KV cache"]
    assert plan["KV block"] == "262144 bytes for 128 tokens"


def test_a_mock_needs_no_memory(home: Home) -> None:
    home.model["modelInstanceType"] = "StandardMock"
    assert "no weights are loaded" in rows(check(home))["memory"]


def test_all_findings_and_the_warnings_stand_on_standard_output(home: Home) -> None:
    home.server.update(port=80, maxLinkNum="300")
    home.server["tlsCrlFile"] = ["x.pem"]
    done = check(home)
    assert done.returncode == 1
    assert "[config] ServerConfig.port=80: out of range; allowed: [1024, 65535]" in done.stdout
    assert "did you mean 300?" in done.stdout
    assert (
        "warning: unknown keys, ignored: ServerConfig.tlsCrlFile (did you mean tlsCrlFiles?)" in done.stdout
    )
    assert "2 errors" in done.stdout.splitlines()[-1]


def test_a_broken_certificate_is_not_valid(home: Home) -> None:
    broken = home.put("security/certs/metrics/server.pem", "no certificate")
    done = check(home)
    assert done.returncode == 1
    assert f"[tls] ServerConfig.metricsTlsCert={broken}: cannot be read" in done.stdout
    assert "valid" not in done.stdout and "Traceback" not in done.stderr
