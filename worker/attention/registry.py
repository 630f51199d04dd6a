"""Backend name -> implementation, imported when chosen."""

from __future__ import annotations

import importlib

from worker.attention.base import AttentionBackend, AttentionSpec

BACKENDS: dict[str, tuple[str, str]] = {
    "cpu_paged": ("worker.attention.cpu_paged", "CpuPagedAttention"),
    "cpu_native": ("worker.attention.cpu_native", "CpuNativeAttention"),
    "cpu_invariant": ("worker.attention.cpu_invariant", "CpuInvariantAttention"),
    "npu": ("worker.attention.npu", "NpuAttention"),
    "triton": ("worker.attention.triton_paged", "TritonAttention"),
    "reference": ("worker.attention.reference", "ReferenceAttention"),
}


def make_attention(name: str, spec: AttentionSpec) -> AttentionBackend:
    module, cls = BACKENDS[name]
    backend: AttentionBackend = getattr(importlib.import_module(module), cls)(spec)
    return backend
