"""Which addresses are bound, and which planes each of them serves (operations.md section 7)."""

from __future__ import annotations

from typing import NamedTuple

from engine.settings import Plane


class Binding(NamedTuple):
    planes: tuple[Plane, ...]
    address: str
    port: int


def merge_planes(
    business_address: str, management_address: str, port: int, management_port: int, metrics_port: int
) -> tuple[Binding, ...] | None:
    """Planes that share address and port share one listener, the first plane's certificates serve it.

    None when there is no layout: on one address, business and metrics cannot share a port that management
    does not share.
    """
    if business_address == management_address and port == metrics_port != management_port:
        return None
    wanted: tuple[tuple[Plane, str, int], ...] = (
        ("business", business_address, port),
        ("management", management_address, management_port),
        ("metrics", management_address, metrics_port),
    )
    planes: dict[tuple[str, int], list[Plane]] = {}
    for plane, address, plane_port in wanted:
        planes.setdefault((address, plane_port), []).append(plane)
    return tuple(Binding(tuple(names), *where) for where, names in planes.items())
