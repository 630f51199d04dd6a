"""GET /v2/health/live and /ready: what is true now, from state this process already has."""

from __future__ import annotations

from dataclasses import dataclass, field

from aiohttp import web


@dataclass(slots=True)
class Health:
    """Written by main.py as things happen, read by the management plane.

    `progress`: loading phase per instance, until ready.
    """

    ready: bool = False
    stopping: bool = False
    failed: str | None = None
    progress: dict[int, str] = field(default_factory=dict)

    def note_progress(self, instance: int, phase: str, fraction: float) -> None:
        self.progress[instance] = f"{phase} {fraction * 100:.0f} %"

    def routes(self) -> list[web.RouteDef]:
        return [web.get("/v2/health/live", self._live), web.get("/v2/health/ready", self._ready)]

    async def _live(self, request: web.Request) -> web.Response:
        if self.stopping:
            return _message(503, "the service is stopping")
        if self.failed is not None:
            return _message(500, self.failed)
        return web.Response() if self.ready else _message(200, self._loading())

    async def _ready(self, request: web.Request) -> web.Response:
        if self.stopping:
            return _message(503, "the service is stopping")
        if self.failed is not None:
            return _message(500, self.failed)
        return web.Response() if self.ready else _message(503, self._loading())

    def _loading(self) -> str:
        phases = ", ".join(
            f"instance {instance}: {phase}" for instance, phase in sorted(self.progress.items())
        )
        return f"loading; {phases}" if phases else "loading"


def _message(status: int, text: str) -> web.Response:
    return web.json_response({"message": text}, status=status)
