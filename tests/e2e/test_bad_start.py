"""Everything that keeps the service from starting: one clear line, the right exit code, nothing left."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.harness import HOST, TINY_MODEL, Daemon, model_config

MakeDaemon = Callable[..., Daemon]


def assert_refused(daemon: Daemon, code: int, *words: str) -> None:
    assert daemon.start().wait() == code, daemon.stderr
    assert daemon.stdout == ""
    assert "Traceback" not in daemon.stderr and "started" not in daemon.stderr
    for word in words:
        assert word in daemon.stderr, (word, daemon.stderr)


def test_every_config_finding_is_reported_at_once(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(
        {
            "ServerConfig": {"port": 80, "maxLinkNum": True},
            "BackendConfig": {
                "ScheduleConfig": {"maxPrefillTokens": 1024},
                "ModelDeployConfig": {"maxInputTokenLen": 2048},
            },
        }
    )
    assert_refused(
        daemon, 1, "ServerConfig.port=80", "[1024, 65535]", "ServerConfig.maxLinkNum=true",
        "BackendConfig.ScheduleConfig.maxPrefillTokens=1024", "maxInputTokenLen=2048", "3 errors",
    )  # fmt: skip


def test_broken_json_names_the_place(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon()
    path = daemon.root / "conf" / "config.json"
    path.write_text(path.read_text()[:100])
    assert_refused(daemon, 1, "config.json", "line")


def test_a_missing_config_file_is_named(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon()
    assert daemon.start("--config-file", "/nowhere/config.json").wait() == 1
    assert "/nowhere/config.json" in daemon.stderr


@pytest.mark.parametrize(
    "arguments", [["--nonsense"], ["--config-file"], ["--expert-parallel", "maybe"], ["x"] * 300]
)
def test_a_bad_command_line_lists_the_options(make_daemon: MakeDaemon, arguments: list[str]) -> None:
    daemon = make_daemon()
    assert daemon.start(*arguments).wait() == 2
    assert "--config-file" in daemon.stderr and "--check-config" in daemon.stderr


@pytest.mark.parametrize(
    ("arguments", "code"), [(["--help"], 0), (["--version"], 0), (["--check-config"], 0)]
)
def test_options_that_only_answer(make_daemon: MakeDaemon, arguments: list[str], code: int) -> None:
    daemon = make_daemon()
    assert daemon.start(*arguments).wait() == code


@pytest.mark.parametrize("missing", ["security/ca/ca.pem", "security/keys/server.key.pem"])
def test_a_missing_certificate_names_key_path_and_way_out(make_daemon: MakeDaemon, missing: str) -> None:
    daemon = make_daemon(https=True)
    (daemon.root / missing).unlink()
    assert_refused(daemon, 1, str(daemon.root / missing), "httpsEnabled=false")


def test_a_key_that_does_not_belong_to_its_certificate(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(https=True)
    key = daemon.root / "security" / "keys" / "server.key.pem"
    key.chmod(0o600)
    shutil.copyfile(daemon.client_dir / "client.key.pem", key)
    assert_refused(daemon, 4, "server.key.pem", "certs/server.pem", "install the key")


def test_a_private_key_others_can_read_is_refused(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(https=True)
    key = daemon.root / "security" / "keys" / "server.key.pem"
    key.chmod(0o644)
    assert_refused(daemon, 1, f"chmod 0600 {key}")


def test_a_taken_port_names_plane_address_and_owner(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon()
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind((HOST, daemon.management_port))
        taken.listen()
        assert_refused(
            daemon, 3, "management plane", f"{HOST}:{daemon.management_port}", f"by pid {os.getpid()}"
        )


def test_an_address_of_another_machine(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon({"ServerConfig": {"ipAddress": "192.0.2.1"}})
    assert_refused(daemon, 3, "business plane", "192.0.2.1")


def copy_of_the_model(tmp_path: Path) -> Path:
    target = tmp_path / "model"
    shutil.copytree(TINY_MODEL, target)
    for path in target.iterdir():
        path.chmod(0o640)
    return target


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_model_directory_without_a_file_is_refused_before_loading(
    make_daemon: MakeDaemon, tmp_path: Path, missing: str
) -> None:
    model = copy_of_the_model(tmp_path)
    (model / missing).unlink()
    assert_refused(
        make_daemon(model=model), 1, str(model), missing.replace("model.safetensors", "safetensors")
    )


def test_a_model_directory_that_does_not_exist(make_daemon: MakeDaemon) -> None:
    assert_refused(make_daemon(model_config(modelWeightPath="/nowhere/model")), 1, "/nowhere/model")


def test_truncated_weights_end_the_start_with_one_line(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    model = copy_of_the_model(tmp_path)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert_refused(make_daemon(model=model), 1, f"{weights}: ", "expected", "cut short")


@pytest.mark.parametrize(
    ("architecture", "told"),
    [("T5ForConditionalGeneration", "LlamaForCausalLM"), ("MambaForCausalLM", "Qwen2ForCausalLM's")],
)
def test_an_architecture_that_cannot_be_served(
    make_daemon: MakeDaemon, tmp_path: Path, architecture: str, told: str
) -> None:
    """The first lists those that can; the second is not what model_type says."""
    model = copy_of_the_model(tmp_path)
    config = model / "config.json"
    config.write_text(config.read_text().replace("Qwen2ForCausalLM", architecture))
    daemon = make_daemon(model=model).start()
    assert daemon.wait() == 5
    assert architecture in daemon.stderr and told in daemon.stderr


def test_too_few_cache_blocks_say_how_many_are_needed(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon({"BackendConfig": {"runtimeConfig": {"kvCacheBlockNum": 3}}}).start()
    assert daemon.wait() == 5
    assert (
        "maxSeqLen" in daemon.stderr and "20" in daemon.stderr and "3" in daemon.stderr
    )  # 2560 / 128 blocks


@pytest.mark.parametrize(("device", "words"), [("npu", "torch_npu"), ("cuda", "built without CUDA")])
def test_a_device_that_is_not_there(make_daemon: MakeDaemon, device: str, words: str) -> None:
    if device == "cuda" and torch.version.cuda:
        pytest.skip("this torch has CUDA: tests/worker/test_cuda_start.py asks drivers of its own")
    daemon = make_daemon({"BackendConfig": {"runtimeConfig": {"deviceType": device}}}).start()
    assert daemon.wait() == 5
    assert f"deviceType '{device}': " in daemon.stderr and words in daemon.stderr


def test_F10_shared_memory_names_the_need(make_daemon: MakeDaemon) -> None:
    """A prompt ring larger than /dev/shm: refused with numbers, not a crash in a request."""
    free = os.statvfs("/dev/shm")
    limit = free.f_bavail * free.f_frsize // (64 * 4)  # prompt slots x bytes per id
    tokens = min(limit + 1_000_000, 4_194_304)
    if tokens <= limit:
        pytest.skip("/dev/shm is larger than any prompt ring can be")
    deploy = {"maxSeqLen": tokens + 1, "maxInputTokenLen": tokens}
    schedule = {"maxPrefillTokens": tokens}
    daemon = make_daemon({"BackendConfig": {"ModelDeployConfig": deploy, "ScheduleConfig": schedule}})
    assert_refused(daemon, 7, "/dev/shm", "MiB")
