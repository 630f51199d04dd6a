"""What must be in the environment before torch is loaded."""

from __future__ import annotations

import os


def prepare_environment() -> None:
    """Settings that torch and its libraries read once; an operator's own win."""
    _let_idle_threads_sleep()
    _bound_kernel_caches()
    # ranks on one machine meet on its own interface: what a host name resolves to may be reached from outside
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def _let_idle_threads_sleep() -> None:
    """Let idle compute threads spin only briefly before they sleep.

    At the end of a parallel region a thread waits for the others. Spinning for long takes the core from the
    very thread it waits for as soon as anything else runs on the machine; sleeping at once pays a wake-up per
    region. On two cores, decode of a 0.5B model at batch 1, alone / the shipped model beside two busy
    processes: libgomp's default 55 / 159 ms, sleeping at once 76 / 1.9 ms, 10,000 turns 57 / 4 ms
    (scripts/profile_step.py).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def _bound_kernel_caches() -> None:
    """Keep fewer of the kernels that oneDNN makes, and of what torch keeps beside each: half a MiB together.

    Of either it is 1024 by default. A model's four shapes, times the row counts of worker/layers/linear.py,
    are fewer than these.
    """
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(cache, "512")
