"""The wheel holds every module, under a name of its own, and the commands in it start."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from daemon.main import VERSION

REPO = Path(__file__).resolve().parents[1]
FOLDERS = ("daemon", "endpoint", "engine", "worker")
PREFIX = "mindie_server"


@pytest.fixture(scope="module")
def config() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(REPO / "setup.cfg", encoding="utf-8")
    return parser


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built offline from a copy, as scripts/serve.sh builds it; setuptools would litter the tree."""
    copy = tmp_path_factory.mktemp("tree")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPO / name, copy)
    for name in FOLDERS:
        shutil.copytree(REPO / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(out), str(copy)]
    result = subprocess.run([*command, *options], capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    (built,) = out.glob("*.whl")
    return built


def package_folders() -> set[str]:
    return {
        ".".join(path.parent.relative_to(REPO).parts)
        for folder in FOLDERS
        for path in (REPO / folder).rglob("*.py")
    }


def names(requirements: str) -> set[str]:
    found = (re.match(r"[\w.-]+", line) for line in requirements.splitlines())
    return {match[0].lower().replace("_", "-") for match in found if match}


def test_the_list_of_packages_is_what_lies_on_disk(config: configparser.ConfigParser) -> None:
    listed = config["options"]["packages"].split()
    assert len(listed) == len(set(listed))
    assert set(listed) == {f"{PREFIX}.{package}" for package in package_folders()}


def test_every_package_has_an_init() -> None:
    assert [p for p in package_folders() if not (REPO / p.replace(".", "/") / "__init__.py").is_file()] == []


def test_the_wheel_holds_every_module_and_nothing_outside_its_prefix(wheel: Path) -> None:
    wanted = {
        f"{PREFIX}/{path.relative_to(REPO)}"
        for folder in FOLDERS
        for path in (REPO / folder).rglob("*")
        if path.suffix in (".py", ".cpp", ".h")
    }
    with zipfile.ZipFile(wheel) as archive:
        packed = {
            name for name in archive.namelist() if not name.startswith(f"{PREFIX}-{VERSION}.dist-info/")
        }
    assert packed == wanted


@pytest.mark.parametrize("command", ["mindieservice_daemon", "mindie_llm_server"])
def test_the_installed_command_starts(
    config: configparser.ConfigParser, wheel: Path, tmp_path: Path, command: str
) -> None:
    """From the wheel alone, in a directory from which the tree cannot be imported by accident."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    targets = dict(
        line.split(" = ") for line in config["options.entry_points"]["console_scripts"].split("\n") if line
    )
    module, function = targets[command].split(":")
    script = (
        f"import sys; sys.argv = [{command!r}, '--version']; from {module} import {function}; {function}()"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stdout) == (0, f"mindieservice_daemon {VERSION}\n"), result.stderr


def test_the_version_is_told_in_one_voice(config: configparser.ConfigParser) -> None:
    assert config["metadata"]["version"] == VERSION


def test_everything_required_is_pinned(config: configparser.ConfigParser) -> None:
    """Except torch_npu, which belongs to a CANN release that the operator chooses."""
    required = names(config["options"]["install_requires"]) | names(config["options.extras_require"]["dev"])
    pins = [line for line in (REPO / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert [
        pin for pin in pins if not re.match(r'[\w.-]+==[\w.]+(; python_version (<|>=) "3\.\d+")?$', pin)
    ] == []
    assert required - names("\n".join(pins)) == set()
