#!/usr/bin/env python3
"""Compile the kernels for the Python that runs this; only the standard library is needed.

    .venv/bin/python worker/native/build.py

scripts/serve.sh and scripts/test.sh do it. Nothing happens when the same sources have been compiled before.
Without a C++ compiler, or when it fails, one line says so on stderr and the exit code is 1: the server then
computes with torch alone. CXX names the compiler.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_SOURCES = Path(__file__).resolve().parent
_FLAGS = (
    "-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fno-exceptions", "-fno-rtti", "-fvisibility=hidden",
    # equal sums in every place they are written: no multiplication and addition become one by themselves
    "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
)  # fmt: skip
_AVX2 = ("-mavx2", "-mfma")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni")
_AVX512_BF16 = (*_AVX512, "-mavx512bf16")
# the names are those of dispatch.cpp, which chooses among them when the library is loaded
_INSTRUCTION_SETS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "plain": (),
        "avx2": _AVX2,
        "avx512": _AVX512,
        "avx512bf16": _AVX512_BF16,
        "amx": (*_AVX512_BF16, "-mamx-tile", "-mamx-bf16", "-mamx-int8", "-mprfchw"),
    },
}
_ANY_PROCESSOR: dict[str, tuple[str, ...]] = {"plain": ()}
_COMPILE_S = 120


class BuildError(Exception):
    """Why there is no library; the text is for the user."""


def library_path() -> Path:
    """Where the library of these sources is, or would be: in the environment of this Python."""
    sources = hashlib.sha256()
    for path in sorted(_SOURCES.iterdir()):
        if path.suffix in (".cpp", ".h") or path.name == "build.py":
            sources.update(path.name.encode() + b"\0" + path.read_bytes())
    return Path(sys.prefix) / "lib" / "mindie-native" / f"kernels-{sources.hexdigest()[:16]}.so"


def build(target: Path) -> None:
    """Compile the library. It appears at `target` as a whole: others may build at the same time."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise BuildError("there is no C++ compiler; on Debian and Ubuntu: apt install g++")
    variants = _INSTRUCTION_SETS.get(platform.machine(), _ANY_PROCESSOR)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            jobs = [["dispatch.cpp", "-o", f"{folder}/dispatch.o"]]
            jobs += [
                ["kernels.cpp", f"-DISA={name}", *flags, "-o", f"{folder}/{name}.o"]
                for name, flags in variants.items()
            ]
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(lambda job: _run([compiler, *_FLAGS, "-c", *job]), jobs))
            whole = Path(folder) / "whole.so"
            objects = [job[-1] for job in jobs]
            _run([compiler, "-shared", "-fopenmp", "-Wl,--no-undefined", *objects, "-o", str(whole)])
            whole.replace(target)
    except OSError as error:
        raise BuildError(str(error)) from None


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, cwd=_SOURCES, capture_output=True, text=True, timeout=_COMPILE_S)
    except subprocess.TimeoutExpired:
        raise BuildError(f"{command[0]} took more than {_COMPILE_S} s") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise BuildError(f"{command[0]} failed: {lines[0] if lines else f'exit code {done.returncode}'}")


def main() -> int:
    target = library_path()
    if target.exists():
        return 0
    try:
        build(target)
    except BuildError as error:
        print(f"no compiled kernels, torch alone will compute, more slowly: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
