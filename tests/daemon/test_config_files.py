"""What has to be on disk: permissions, certificates, the model directory."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.daemon.config_home import Home, deny

PERMISSIONS = "MINDIE_CHECK_INPUTFILES_PERMISSION"


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path)
    home.put_tls_files()
    return home


# --- permissions ---


def test_wide_config_warns_with_the_command(home: Home) -> None:
    home.put("open.json", json.dumps(home.document), 0o644)
    home.environ = {"MIES_CONFIG_JSON_PATH": str(home.root / "open.json")}
    assert home.warning("wider").endswith(
        f"mode 0644 is wider than 0640 (others may read); run: chmod 0640 {home.root}/open.json"
    )
    home.environ[PERMISSIONS] = "1"
    assert "chmod 0640" in home.only_finding()
    home.environ[PERMISSIONS] = "0"
    assert not [warning for warning in home.load().warnings if "chmod" in warning]


def test_F16_what_cannot_be_read_comes_with_the_command(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real mode would not stop root."""
    weights = home.model_dir / "model.safetensors"
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != weights and real(path, mode))
    assert f"cannot be read: {weights}; run: chmod u+r {weights}" in home.only_finding()
    if os.geteuid() != 0:
        return  # only root can give a file away
    os.chown(weights, 12345, -1)
    assert f"it belongs to uid 12345; run: chown {os.geteuid()} {weights}" in home.only_finding()


def test_wide_private_key_is_refused(home: Home) -> None:
    key = home.root / "security/keys/server.key.pem"
    key.chmod(0o644)
    finding = home.only_finding()
    assert "ServerConfig.tlsPk=" in finding and f"chmod 0600 {key}" in finding
    home.environ = {PERMISSIONS: "0"}
    home.load()


def test_wide_password_file_is_refused(home: Home) -> None:
    home.server["tlsPkPwd"] = "security/pass/key_pwd.txt"
    home.put("security/pass/key_pwd.txt", "secret-word", 0o640)
    finding = home.only_finding()
    assert "tlsPkPwd" in finding and "secret-word" not in finding


def test_wide_certificate_warns(home: Home) -> None:
    (home.root / "security/certs/server.pem").chmod(0o644)
    assert "chmod 0640" in home.warning("ServerConfig.tlsCert=")


def test_foreign_key_is_refused_and_foreign_weights_warn(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    findings = home.findings()
    assert all("Pk=" in finding and f"chown {owner + 1}" in finding for finding in findings)
    assert len(findings) == 3  # the keys; certificates, weights and the file itself only warn


def test_weights_are_judged_as_one_directory(home: Home) -> None:
    (home.model_dir / "model.safetensors").chmod(0o644)
    (home.model_dir / "tokenizer.json").chmod(0o644)
    warning = home.warning("modelWeightPath")
    assert "model.safetensors" in warning and f"chmod -R u=rwX,g=rX,o= {home.model_dir}" in warning


# --- certificates ---


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tlsCert", "../outside.pem"),
        ("tlsCert", "security/../../outside.pem"),
        ("tlsCaPath", "../"),
    ],
)
def test_paths_stay_inside_the_root(home: Home, key: str, value: str) -> None:
    (home.root.parent / "outside.pem").write_text("x", encoding="utf-8")
    home.server[key] = value
    assert all("outside of the installation root" in finding for finding in home.findings())


@pytest.mark.parametrize("link", ["security/keys/server.key.pem", "security/keys"])
def test_symbolic_links_are_refused(home: Home, link: str) -> None:
    path = home.root / link
    target = path.rename(path.with_name("moved"))
    path.symlink_to(target)
    assert any(f"{path} is a symbolic link" in finding for finding in home.findings())


def test_root_may_be_reached_through_a_link(home: Home, tmp_path_factory: pytest.TempPathFactory) -> None:
    link = tmp_path_factory.mktemp("elsewhere") / "link"
    link.symlink_to(home.root)
    home.environ = {"MINDIE_LLM_HOME_PATH": str(link)}
    home.load()


def test_directory_path_without_trailing_slash(home: Home) -> None:
    home.server["tlsCaPath"] = "security/ca"
    home.load()


def test_missing_crl_says_how_to_do_without(home: Home) -> None:
    (home.root / "security/certs/server_crl.pem").unlink()
    assert "set ServerConfig.tlsCrlFiles to []" in home.only_finding()
    home.server["tlsCrlFiles"] = []
    tls = home.load().endpoint.listeners[0].tls
    assert tls is not None and tls.crl_files == ()


def test_only_listeners_of_their_own_need_certificates(home: Home) -> None:
    home.server.update(managementIpAddress="127.0.0.1", managementPort=1025, metricsPort=1025)
    for name in [name for name in home.server if name.startswith(("managementTls", "metricsTls"))]:
        del home.server[name]
    (listener,) = home.load().endpoint.listeners
    assert listener.planes == ("business", "management", "metrics")


def test_missing_key_of_a_needed_set(home: Home) -> None:
    del home.server["managementTlsPk"]
    assert home.only_finding().startswith("[config] ServerConfig.managementTlsPk=<absent>")


def test_too_many_ca_files(home: Home) -> None:
    home.server["tlsCaFile"] = ["ca.pem"] * 4
    assert "1 to 3" in home.only_finding()


def test_shared_certificate_is_remarked_upon(home: Home) -> None:
    home.server["managementTlsCert"] = home.server["tlsCert"]
    assert home.warning("separate sets are recommended")


@pytest.mark.parametrize("name", ["security/keys", "security", "models"])
def test_a_directory_of_another_user_is_a_finding(
    home: Home, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    deny(monkeypatch, home.root / name)
    findings = home.findings()
    assert all("cannot be read: " in finding and "Permission denied" in finding for finding in findings)
    key = "modelWeightPath" if name == "models" else "tlsPk"
    assert any(f"{key}=" in finding for finding in findings)


@pytest.mark.parametrize("section", ["server", "model"])
def test_a_name_that_no_file_can_have_is_a_finding(home: Home, section: str) -> None:
    long = "x" * 256
    if section == "server":
        home.server["tlsPk"] = f"security/{long}"
    else:
        home.model["modelWeightPath"] = f"models/{long}"
    assert "File name too long" in home.only_finding()


def test_a_model_of_links_into_a_foreign_cache_can_be_judged(
    home: Home, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    cache = tmp_path_factory.mktemp("cache")
    (home.model_dir / "extra.json").symlink_to(cache / "blob")
    (home.model_dir / "loop").symlink_to("loop")
    deny(monkeypatch, home.model_dir / "extra.json")
    home.load()


def test_certificates_are_judged_with_everything_else(home: Home) -> None:
    home.put("security/certs/management/server.pem", "no certificate")
    home.schedule["maxBatchSize"] = 0
    config, tls = home.findings()
    assert config.startswith("[config] BackendConfig.ScheduleConfig.maxBatchSize=0")
    assert tls.startswith("[tls] ServerConfig.managementTlsCert=")


# --- model directory ---


def test_everything_wrong_with_a_model_at_once(home: Home) -> None:
    (home.model_dir / "tokenizer.json").rename(home.model_dir / "tokeniser.json")
    (home.model_dir / "model.safetensors").rename(home.model_dir / "pytorch_model.bin")
    home.put("models/mindie-tiny/config.json", '{"vocab_size": true}')
    findings = home.findings()
    parts = ("tokeniser.json", "pickled weights", "model_type", "torch_dtype")
    for part in parts:
        assert any(part in finding for finding in findings), part
    assert all("modelWeightPath" in finding for finding in findings)


@pytest.mark.parametrize("text", ["{", "[]", '{"a": ' * 5000])
def test_broken_model_config(home: Home, text: str) -> None:
    home.put("models/mindie-tiny/config.json", text)
    assert str(home.model_dir / "config.json") in home.only_finding()


def test_a_byte_order_mark_is_tolerated_as_in_the_configuration(home: Home) -> None:
    file = home.model_dir / "config.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    home.load()
    file.write_bytes("{}".encode("utf-16"))
    assert "cannot be read" in home.only_finding()


def test_accepted_spellings_of_a_model_config(home: Home) -> None:
    config = {"model_type": "llama", "padded_vocab_size": 10, "dtype": "bfloat16"}
    home.put("models/mindie-tiny/config.json", json.dumps(config))
    home.load()


def test_other_ways_of_quantising_are_refused(home: Home) -> None:
    config = {
        "model_type": "llama",
        "vocab_size": 10,
        "torch_dtype": "float16",
        "quantization_config": {"a": 1},
    }
    home.put("models/mindie-tiny/config.json", json.dumps(config))
    assert '"quantize"' in home.only_finding()


def test_a_quantised_checkpoint_without_its_description_is_refused(home: Home) -> None:
    config = {"model_type": "llama", "vocab_size": 10, "torch_dtype": "float16", "quantize": "w8a8"}
    home.put("models/mindie-tiny/config.json", json.dumps(config))
    assert "quant_model_description.json" in home.only_finding()


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model.safetensors"])
def test_only_a_mock_needs_no_files(home: Home, missing: str) -> None:
    (home.model_dir / missing).unlink()
    assert missing.removeprefix("model") in home.only_finding()
    home.model["modelInstanceType"] = "StandardMock"
    assert home.load().model.instance_type == "StandardMock"


def test_a_mock_still_needs_its_directory_and_a_readable_config(home: Home) -> None:
    home.model["modelInstanceType"] = "StandardMock"
    home.put("models/mindie-tiny/config.json", "{")
    assert str(home.model_dir / "config.json") in home.only_finding()
    home.model["modelWeightPath"] = "models/none"
    assert "no such directory" in home.only_finding()


def test_missing_model_directory_suggests_the_nearest(home: Home) -> None:
    home.model["modelWeightPath"] = "models/mindie-tyni"
    assert f"did you mean {home.model_dir}?" in home.only_finding()


def test_sequences_beyond_the_model_warn(home: Home) -> None:
    config = {
        "model_type": "llama",
        "vocab_size": 10,
        "torch_dtype": "float16",
        "max_position_embeddings": 512,
    }
    home.put("models/mindie-tiny/config.json", json.dumps(config))
    assert "max_position_embeddings=512" in home.warning("maxSeqLen=2560")
