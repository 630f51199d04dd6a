#!/usr/bin/env python3
"""Reads the schemas of the operators we call out of a torch_npu wheel, without importing or installing it.

    pip download torch_npu==2.13.0 --no-deps -d /tmp/wheel
    python scripts/extract_npu_schemas.py /tmp/wheel/torch_npu-*.whl

The library that registers the operators holds each schema as a string of its own. Written into
tests/npu_schemas/operators.json are these strings, sorted by name, and the version of the wheel. A missing
operator is an error: it has another name there, or we may not call it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch

TABLE = Path(__file__).resolve().parents[1] / "tests" / "npu_schemas" / "operators.json"
_LIBRARY = "torch_npu/lib/libtorch_npu.so"
# name(arguments) -> results, ended by NUL as every C string; arguments may hold one level of parentheses
_SCHEMA = re.compile(rb"\0([A-Za-z_][\w:.]*\([^\0()]*(?:\([^\0()]*\)[^\0()]*)*\) -> [^\0]{2,400})(?=\0)")

OPERATORS = (
    # what worker/attention/npu.py and worker/platforms/npu*.py call
    "npu_add_rms_norm",
    "npu_dynamic_quant",
    "npu_format_cast",
    "npu_fused_infer_attention_score",
    "npu_mrope",
    "npu_quant_matmul",
    "npu_quantize",
    "npu_rms_norm",
    "npu_rotary_mul",
    "npu_scatter_pa_kv_cache",
    "npu_swiglu",
    "npu_top_k_top_p",
    "npu_trans_quant_param",
    "npu_weight_quant_batchmatmul",
    # what a captured graph makes of the attention
    "npu_fused_infer_attention_score.out",
    "_npu_fused_infer_attention_score_get_max_workspace",
    "_npu_fused_infer_attention_score_infer_output",
    # for what is to come: routed experts, the attention with a compressed cache, products joined with a sum
    "npu_grouped_matmul",
    "npu_interleave_rope",
    "npu_kv_rmsnorm_rope_cache",
    "npu_mm_all_reduce_base",
    "npu_moe_gating_top_k",
    "npu_moe_gating_top_k_softmax",
    "npu_moe_init_routing_v2",
    "npu_moe_token_unpermute",
)


class MissingOperators(Exception):
    """Names the wheel has no schema for."""


def schemas(wheel: Path, names: tuple[str, ...] = OPERATORS) -> dict[str, str]:
    """Schema of each named operator, "npu::" before its name. Raises MissingOperators, zipfile.BadZipFile."""
    with zipfile.ZipFile(wheel) as archive:
        found = dict(_found(archive.read(_LIBRARY)))
    missing = sorted(set(names) - found.keys())
    if missing:
        raise MissingOperators(f"{wheel.name}: {_LIBRARY} has no schema for {', '.join(missing)}")
    return {name: found[name] for name in sorted(names)}


def version_of(wheel: Path) -> str:
    """Of a file with a wheel's name: name-version-python-abi-platform.whl."""
    return wheel.name.split("-")[1]


def _found(library: bytes) -> Iterator[tuple[str, str]]:
    """(name with its overload, schema) of whatever torch takes for a schema of the npu:: operators."""
    for match in _SCHEMA.finditer(library):
        text = match.group(1).decode("ascii", "ignore")
        try:
            schema = torch._C.parse_schema(text)
        except RuntimeError:  # a sentence of some error message
            continue
        namespace, _, name = schema.name.rpartition("::")
        if namespace in ("", "npu"):
            overload = f".{schema.overload_name}" if schema.overload_name else ""
            yield f"{name}{overload}", text if namespace else f"npu::{text}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("wheel", type=Path, help="torch_npu-VERSION-....whl")
    parser.add_argument("--output", type=Path, default=TABLE, help="file to write (default: %(default)s)")
    given = parser.parse_args()
    try:
        table = {"torch_npu": version_of(given.wheel), "schemas": schemas(given.wheel)}
    except (OSError, zipfile.BadZipFile, KeyError, MissingOperators) as error:
        print(f"{given.wheel}: {error}", file=sys.stderr)
        return 1
    given.output.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    print(f"{given.output}: {len(table['schemas'])} schemas of torch_npu {table['torch_npu']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
