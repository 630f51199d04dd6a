"""Generates the shared libraries that torch_npu links and looks up, from what its own libraries ask for.

Every function answers 0, which is success; runtime/ has those that must do more, and the kernels of operators
count their launches. A mangled C++ name is a valid name in C, so one generated C file serves all.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

from npu_stand_in.unavailable import Unavailable

RUNTIME = sorted((Path(__file__).resolve().parent / "runtime").iterdir())
_HEADERS = "include/third_party/acl/inc"  # in the wheel

# by their file names the loader takes them for the libraries of CANN; the first has all the code
NAMES = (
    "ascendcl", "hccl", "acl_op_compiler", "ge_runner", "graph", "acl_tdt_channel", "atb", "fmk_parser",
    "ascend_protobuf", "opapi", "nnopbase",
)  # fmt: skip

# Looked up at run time and used where they are there, in ways that a function answering 0 does not bear.
LEFT_OUT = {
    "aclGetCannAttribute", "aclGetCannAttributeList", "aclrtGetDeviceResLimit", "aclrtGetHardwareSyncAddr",
    "aclrtGetMemUsageInfo", "aclrtGetResInCurrentThread", "aclrtGetStreamResLimit", "aclrtIpcMemGetExportKey",
    "aclrtPointerGetAttributes", "aclsysGetCANNVersion",
}  # fmt: skip

_SYSTEM = ("libc.so.6", "libm.so.6", "libstdc++.so.6", "libgcc_s.so.1", "ld-linux-x86-64.so.2")
_KERNEL = re.compile(rb"\baclnn[A-Z]\w+\b")
_LOOKED_UP = re.compile(rb"\b(?:acl(?:rt|mdl|prof|op|sys)?|Hccl)[A-Z]\w{3,}\b")
_FLAGS = ("-std=gnu11", "-O1", "-fno-builtin", "-fPIC")


def library_folder(home: Path, wheel: Path) -> Path:
    """Where the libraries for this wheel and these sources lie, or would."""
    sources = b"".join(path.read_bytes() for path in (*RUNTIME, Path(__file__)))
    return home / f"libraries-{wheel.name}-{hashlib.sha256(sources).hexdigest()[:12]}"


def find_libraries(home: Path, wheel: Path) -> Path:
    """Raises Unavailable when they have not been built."""
    folder = library_folder(home, wheel)
    if not folder.is_dir():
        raise Unavailable(f"no libraries in {folder}; `python scripts/npu_sim.py build` makes them")
    return folder


def build_libraries(home: Path, wheel: Path) -> Path:
    """The folder with the libraries, made in some seconds where it was not there. Raises Unavailable."""
    folder = library_folder(home, wheel)
    if folder.is_dir():
        return folder
    for tool in ("gcc", "nm"):
        if shutil.which(tool) is None:
            raise Unavailable(f"{tool} is not there; on Debian and Ubuntu: apt install gcc binutils")
    with tempfile.TemporaryDirectory(dir=home) as scratch:
        unfinished = Path(scratch) / "lib"
        unfinished.mkdir()
        _compile(unfinished, wheel / "torch_npu")
        unfinished.rename(folder)
    return folder


def needed_names(package: Path) -> tuple[set[str], set[str]]:
    """(functions, operator kernels) that the package's libraries want and nobody here has."""
    ours = sorted(
        {*package.glob("*.so"), *package.glob("lib/*.so"), *package.glob("dynamo/torchair/core/*.so")}
    )
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    torch_libraries = sorted((Path(spec.origin).parent / "lib").glob("*.so*"))
    system = [Path(_output("gcc", f"-print-file-name={name}")) for name in _SYSTEM]
    there = _symbols(
        [*ours, *torch_libraries, *(path for path in system if path.is_file())], "--defined-only"
    )
    linked = {name for name in _symbols(ours, "--undefined-only") - there if not re.match("_?Py", name)}
    text = b"\0".join(path.read_bytes() for path in package.glob("lib/*.so"))
    kernels = {match.decode() for match in set(_KERNEL.findall(text))}
    kernels = {name for name in kernels if not name.endswith("GetWorkspaceSize")}
    looked_up = {match.decode() for match in set(_LOOKED_UP.findall(text))}
    looked_up = {name for name in looked_up if not name.startswith("aclnn")}
    return (linked | looked_up) - there - kernels - LEFT_OUT, kernels


def generated_source(functions: Iterable[str], kernels: Iterable[str]) -> str:
    """C: `functions` answer 0, `kernels` count their launches."""
    names = sorted(kernels)
    lines = [f"long {name}(void) {{ return 0; }}" for name in sorted(functions)]
    lines.append(f"static unsigned long launches[{len(names) + 1}];")
    for row, name in enumerate(names):
        lines.append(f"int {name}GetWorkspaceSize(void) {{ return 0; }}")
        lines.append(f"int {name}(void) {{ __atomic_fetch_add(&launches[{row}], 1, 0); return 0; }}")
    quoted = "".join(f'"{name}", ' for name in names)
    lines.append(f"static const char *const names[] = {{{quoted}0}};")
    lines.append(f"int npu_sim_num_kernels(void) {{ return {len(names)}; }}")
    lines.append("const char *npu_sim_kernel_name(int row) { return names[row]; }")
    lines.append("unsigned long npu_sim_launches(int row) { return launches[row]; }")
    return "\n".join(lines) + "\n"


def _compile(folder: Path, package: Path) -> None:
    objects = []
    for source in RUNTIME:
        if source.suffix == ".c":
            objects.append(str(folder / f"{source.stem}.o"))
            _gcc("-Wall", f"-I{package / _HEADERS}", "-c", str(source), "-o", objects[-1])
    functions, kernels = needed_names(package)
    generated, empty = folder / "generated.c", folder / "empty.c"
    generated.write_text(
        generated_source(functions - _symbols(objects, "--defined-only"), kernels), encoding="utf-8"
    )
    empty.touch()
    first, *others = NAMES
    _link(folder, first, *objects, "-w", str(generated), "-lpthread", "-lrt")
    for name in others:
        _link(folder, name, str(empty), f"-L{folder}", "-Wl,--no-as-needed", f"-l{first}")
    for path in (*map(Path, objects), generated, empty):
        path.unlink()


def _link(folder: Path, name: str, *arguments: str) -> None:
    _gcc("-shared", *arguments, f"-Wl,-soname,lib{name}.so", "-o", str(folder / f"lib{name}.so"))


def _gcc(*arguments: str) -> None:
    done = subprocess.run(["gcc", *_FLAGS, *arguments], capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "error" in line] or ["no word"]
        raise Unavailable(f"gcc could not make {Path(arguments[-1]).name}: {said[0]}")


def _symbols(files: Iterable[Path | str], which: str) -> set[str]:
    """Symbols other files can see, without their versions; of the undefined ones those that must be found."""
    listed = "".join(
        _output("nm", *(["-D"] if ".so" in Path(file).name else []), "-P", which, str(file)) + "\n"
        for file in files
    )
    rows = (line.split() for line in listed.splitlines())
    return {
        row[0].partition("@")[0] for row in rows if len(row) > 1 and (row[1].isupper() or row[1] in "iuv")
    }


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})
    return done.stdout.strip()
