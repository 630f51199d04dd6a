"""What must be in the environment before torch is loaded."""

from __future__ import annotations

import os


def prepare_environment() -> None:
    """Let idle compute threads spin only briefly before they sleep; an operator's own setting wins.

    At the end of a parallel region a thread waits for the others. Spinning for long takes the core from the
    very thread it waits for as soon as anything else runs on the machine; sleeping at once pays a wake-up per
    region. On two cores, decode of a 0.5B model at batch 1, alone / the shipped model beside two busy
    processes: libgomp's default 55 / 159 ms, sleeping at once 76 / 1.9 ms, 10,000 turns 57 / 4 ms
    (scripts/profile_step.py).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
