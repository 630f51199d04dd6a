"""Imports point one way: daemon -> endpoint | worker -> engine; see docs/architecture.md."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
FOLDERS = ("daemon", "endpoint", "engine", "worker")
BOTTOM = (
    "engine.settings",
    "engine.errors",
    "engine.grammar_limits",
    "engine.logs",
    "engine.sampling_params",
    "engine.outcome",
    "engine.tokenizer_files",
    "engine.wire",
)

MAY_IMPORT_OF_OURS = {
    "daemon": FOLDERS,
    "endpoint": ("endpoint", *BOTTOM),
    "worker": ("worker", "engine"),
    "engine": ("engine",),
}
MAY_NOT_IMPORT_OF_OTHERS = {
    "daemon": ("torch", "torch_npu", "transformers", "tokenizers", "aiohttp"),
    "endpoint": ("torch", "torch_npu"),
    "worker": ("aiohttp",),
    "engine": ("torch", "torch_npu", "transformers", "tokenizers", "aiohttp"),
}
READS_TOKENIZERS = "engine/tokenizer_files.py"  # what the endpoint and the worker must understand alike


def is_below(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def imported_modules(source: str, package: str) -> Iterator[str]:
    """Full names of everything imported anywhere in `source`, a module of `package`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            # `from engine import scheduler` names a module, `from engine.plan import StepPlan` does not
            is_package = (REPO / origin.replace(".", "/")).is_dir()
            yield from (f"{origin}.{alias.name}" for alias in node.names) if is_package else [origin]


def edges(folder: str) -> Iterator[tuple[str, str]]:
    """(importing file, imported module) for every import below `folder`."""
    for path in sorted((REPO / folder).rglob("*.py")):
        name = path.relative_to(REPO)
        package = ".".join(name.parent.parts)
        yield from (
            (str(name), module) for module in imported_modules(path.read_text(encoding="utf-8"), package)
        )


def test_the_reader_of_imports_sees_every_form() -> None:
    source = (
        "import a.b as c\nfrom a import b\nfrom engine import scheduler\nfrom . import y\nfrom ..z import w\n"
        "def f():\n    from worker.main import run_worker\n"
    )
    found = set(imported_modules(source, "engine.wire"))
    assert found == {"a.b", "a", "engine.scheduler", "engine.wire.y", "engine.z", "worker.main"}


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_imports_only_what_lies_below_it(folder: str) -> None:
    of_ours = [edge for edge in edges(folder) if is_below(edge[1], FOLDERS)]
    assert of_ours, "no import found: is the folder still there?"
    assert [edge for edge in of_ours if not is_below(edge[1], MAY_IMPORT_OF_OURS[folder])] == []


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_keeps_to_its_own_trade(folder: str) -> None:
    foreign = [edge for edge in edges(folder) if is_below(edge[1], MAY_NOT_IMPORT_OF_OTHERS[folder])]
    assert [edge for edge in foreign if edge[0] != READS_TOKENIZERS] == []


def test_the_bottom_row_rests_on_itself() -> None:
    rows = [
        edge for edge in edges("engine") if is_below(edge[0].removesuffix(".py").replace("/", "."), BOTTOM)
    ]
    of_ours = [edge for edge in rows if is_below(edge[1], FOLDERS)]
    assert of_ours
    assert [edge for edge in of_ours if not is_below(edge[1], BOTTOM)] == []


def test_torch_npu_is_imported_by_its_platform_only() -> None:
    importers = {
        file for folder in FOLDERS for file, module in edges(folder) if is_below(module, ("torch_npu",))
    }
    assert importers <= {"worker/platforms/npu.py"}


def test_nobody_uses_the_installed_name() -> None:
    """The wheel's prefix is known to the console script alone; the code runs from the tree as well."""
    assert [
        edge for folder in FOLDERS for edge in edges(folder) if is_below(edge[1], ("mindie_server",))
    ] == []


HEAVY = {"torch", "torch_npu", "transformers", "tokenizers", "aiohttp", "numpy", "multiprocessing"}


def test_the_parent_stays_light() -> None:
    """It forks its children, so nothing that starts threads or opens devices may be loaded into it.

    The kernel counts the threads, because Python knows nothing of those that a BLAS starts.
    """
    script = (
        "import sys, daemon.main\n"
        f"heavy = {HEAVY}\n"
        "threads = [line.split()[1] for line in open('/proc/self/status') if line.startswith('Threads:')]\n"
        "print(sorted(heavy & sys.modules.keys()), *threads)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=REPO, capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout == "[] 1\n"
