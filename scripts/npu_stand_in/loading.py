"""Loads the generated libraries into this process, and asks them what happened."""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

from npu_stand_in.libraries import NAMES

LIBRARIES = "NPU_SIM_LIBRARIES"  # their folder


@functools.cache
def runtime() -> ctypes.CDLL:
    """Load them under the names by which torch_npu looks for CANN's: the loader takes what it has already."""
    folder = Path(os.environ[LIBRARIES])
    loaded = [ctypes.CDLL(str(folder / f"lib{name}.so"), mode=ctypes.RTLD_GLOBAL) for name in NAMES]
    library = loaded[0]
    library.npu_sim_kernel_name.restype = ctypes.c_char_p
    library.npu_sim_launches.restype = ctypes.c_ulong
    library.npu_sim_replays.restype = ctypes.c_ulong
    library.npu_sim_note_work.argtypes = [ctypes.c_void_p]
    library.npu_sim_note_work.restype = ctypes.c_int64
    library.aclGetRecentErrMsg.restype = ctypes.c_char_p
    return library


def launches() -> dict[str, int]:
    """How often each operator's kernel was launched in this process, by the kernel's name."""
    library = runtime()
    counts = {
        library.npu_sim_kernel_name(row).decode(): library.npu_sim_launches(row)
        for row in range(library.npu_sim_num_kernels())
    }
    return {name: count for name, count in counts.items() if count}


def replays() -> int:
    """How many graphs have been replayed in this process."""
    return int(runtime().npu_sim_replays())
