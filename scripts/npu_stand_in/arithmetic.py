"""Lets the operators of a simulated NPU compute.

Memory of the stand-in's devices is memory of the process. Each operator runs twice: first torch_npu's own
code, which checks arguments, infers shapes, allocates results and launches a kernel that does nothing; then
the same call on CPU tensors over the same memory, by torch's kernels for the CPU or, for npu:: operators,
by the functions of reference/. While a graph is captured the second part is put off until the graph is
replayed.
"""

from __future__ import annotations

import ctypes
import traceback
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from npu_stand_in.loading import runtime
from npu_stand_in.reference import REFERENCES

# Allocate or look, and need no kernel.
_AS_THEY_ARE = {
    "aten::empty", "aten::empty_strided", "aten::empty_like", "aten::new_empty", "aten::new_empty_strided",
    "aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::detach", "aten::alias",
    "aten::resize_", "aten::set_", "aten::record_stream", "aten::is_pinned", "aten::lift_fresh",
    "npu::_npu_fused_infer_attention_score_get_max_workspace",
    "npu::_npu_fused_infer_attention_score_infer_output", "npu::npu_change_data_ptr",
    "npu::get_npu_format", "npu::get_storage_size",
}  # fmt: skip
# The shape of the result hangs on what a kernel finds: the front end reads it where no kernel has written.
_SHAPED_BY_VALUES = {
    "aten::nonzero", "aten::nonzero_numpy", "aten::masked_select", "aten::unique_dim", "aten::_unique",
    "aten::_unique2", "aten::unique_consecutive", "aten::bincount", "aten::argwhere",
    "aten::repeat_interleave",
}  # fmt: skip
_DONE_BY_THE_RUNTIME = {"c10d", "_c10d_functional"}  # runtime/hccl.c has collectives
_FORGET = 1

_Call = Callable[[], None]


class ReferenceArithmetic(TorchDispatchMode):
    """Computes for the operators called while it is entered, in the thread that has entered it.

    It replaces the worker of the runtime, so there is one in a process.
    """

    def __init__(self) -> None:
        super().__init__()
        self._runtime = runtime()
        self._captured: dict[int, _Call] = {}
        self._worker = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint64, ctypes.c_int)(self._work)
        self._runtime.npu_sim_set_worker(self._worker)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if not _is_about_npu(args, kwargs):
            return func(*args, **kwargs)
        if name == "c10d::allgather_":
            return self._all_gather(*args, **kwargs)
        if name in _AS_THEY_ARE or func.namespace in _DONE_BY_THE_RUNTIME:
            return func(*args, **kwargs)
        call_args, call_kwargs = tree_map(_on_cpu, (args, kwargs))
        if _is_shaped_by_values(name, args):
            found = func(*call_args, **call_kwargs)
            return tree_map(lambda x: x.to("npu") if isinstance(x, Tensor) else x, found)
        self._runtime.npu_sim_replace_kernels(1)
        try:
            result = func(*args, **kwargs)
        finally:
            self._runtime.npu_sim_replace_kernels(0)
        reference = REFERENCES.get(name)
        if reference is None and func.namespace not in ("aten", "prims"):
            raise NotImplementedError(
                f"the stand-in knows no arithmetic for {name}; add it to npu_stand_in/reference"
            )
        changes = func._schema.is_mutable
        fresh = _fresh(result, args, kwargs)
        if reference is None and not changes and not fresh:
            tensors = any(isinstance(leaf, Tensor) for leaf in tree_leaves(result))
            return result if tensors or result is None else func(*call_args, **call_kwargs)

        targets = tree_map(_on_cpu, result)

        def compute() -> None:
            if reference is None:
                found = func(*call_args, **call_kwargs)
            else:
                found = _call_reference(reference, call_args, call_kwargs)
            if not changes:
                _store(name, targets, found)

        self._do_or_note(compute)
        return result

    def _all_gather(
        self, outputs: list[list[Tensor]], inputs: list[Tensor], group: Any, *others: Any
    ) -> tuple[list[list[Tensor]], Any]:
        """Into one tensor, from which torch_npu would copy to `outputs` by a kernel that does nothing."""
        (shares,), (own,) = outputs, inputs
        whole = own.new_empty((len(shares), *own.shape))
        _, work = torch.ops.c10d._allgather_base_(whole, own, group, *others)
        targets, found = tree_map(_on_cpu, shares), _on_cpu(whole)

        def compute() -> None:
            for target, share in zip(targets, found, strict=True):
                target.copy_(share)

        self._do_or_note(compute)
        return outputs, work

    def _do_or_note(self, compute: _Call) -> None:
        work = self._runtime.npu_sim_note_work(torch.npu.current_stream().npu_stream)
        if work < 0:
            raise RuntimeError(self._runtime.aclGetRecentErrMsg().decode())
        if work:
            self._captured[work] = compute
        else:
            compute()

    def _work(self, work: int, what: int) -> int:
        """The runtime's worker: a C function cannot be left by an exception."""
        if what == _FORGET:
            self._captured.pop(work, None)
            return 0
        if work not in self._captured:
            return 0  # captured by an operator without arithmetic of its own
        try:
            with torch.utils._python_dispatch._disable_current_modes():
                self._captured[work]()
        except Exception:
            traceback.print_exc()
            return 1
        return 0


def _is_npu(x: object) -> bool:
    return isinstance(x, Tensor) and x.device.type == "npu"


def _is_about_npu(args: object, kwargs: dict[str, Any]) -> bool:
    if any(_is_npu(leaf) for leaf in tree_leaves((args, kwargs))):
        return True
    return torch.device(kwargs.get("device") or "cpu").type == "npu"


def _is_shaped_by_values(name: str, args: tuple[Any, ...]) -> bool:
    if name in ("aten::index", "aten::index_put_", "aten::index_put"):
        return any(
            isinstance(leaf, Tensor) and leaf.dtype in (torch.bool, torch.uint8)
            for leaf in tree_leaves(args[1])
        )
    if name == "aten::where":
        return len(args) == 1
    return name in _SHAPED_BY_VALUES


def _on_cpu(x: Any) -> Any:
    """A CPU tensor over the memory of a tensor of a simulated device; its device becomes the CPU."""
    if isinstance(x, torch.device):
        return torch.device("cpu") if x.type == "npu" else x
    if not _is_npu(x):
        return x
    storage = x.untyped_storage()
    if not storage.nbytes() or not x.numel():
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    whole = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    return torch.empty(0, dtype=x.dtype).set_(whole, x.storage_offset(), x.shape, x.stride())


def _memories(tree: object) -> set[int]:
    return {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(tree) if _is_npu(leaf)}


def _fresh(result: object, args: object, kwargs: object) -> bool:
    """Whether any result lies elsewhere than the arguments: then somebody has to fill it."""
    given = _memories((args, kwargs))
    elsewhere = (leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.numel())
    return any(not _is_npu(leaf) or leaf.untyped_storage().data_ptr() not in given for leaf in elsewhere)


def _call_reference(reference: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """With `out`, as the overload of that name has it, the result is written there."""
    kwargs = dict(kwargs)
    kwargs.pop("workspace", None)
    out = kwargs.pop("out", None)
    found = reference(*args, **kwargs)
    if out is not None:
        _store(reference.__name__, out, found)
    return found


def _store(name: str, targets: object, found: object) -> None:
    pairs: Iterable[tuple[Any, Any]] = zip(tree_leaves(targets), tree_leaves(found), strict=True)
    for target, value in pairs:
        if not isinstance(target, Tensor) or not target.numel() or target is value:
            continue
        if target.shape != value.shape or target.dtype != value.dtype:
            if value.numel() == 1:
                continue  # a result nobody is to look at: the descriptions leave its shape open
            raise RuntimeError(
                f"{name}: the front end promises {tuple(target.shape)} {target.dtype}, "
                f"the arithmetic gives {tuple(value.shape)} {value.dtype}"
            )
        target.copy_(value)
