"""POST /v1/engine-server/fault-handling-command of the management plane: pause, re-initialise, start."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from endpoint.declarations import Special, range_schema, request_body
from endpoint.health import Command, Health
from endpoint.json_body import parse_body
from endpoint.protocols.base import Body
from endpoint.request_body import read_body
from endpoint.validation import Fields, Range
from engine.settings import EndpointSettings

FAULT_PATH = "/v1/engine-server/fault-handling-command"

_CMD_RANGE = Range(0, int(max(Command)))
_MEANING = "0 pause, 1 re-initialise the devices of a paused service, 2 start, 3 pause as well."


def _read_command(fields: Fields) -> Command:
    value = fields.integer("cmd", _CMD_RANGE)
    if value is None:
        raise fields.error("cmd", f"an integer {_CMD_RANGE}", _MEANING.rstrip("."))
    return Command(value)


_CMD = Special("cmd", _MEANING, _read_command, {"type": "integer", **range_schema(_CMD_RANGE)}, required=True)
FAULT_BODY = request_body(
    "Pause the service, or start it again. Paused it refuses new inference; what runs may finish.",
    _CMD,
    examples={"pause": {"cmd": 0}, "start": {"cmd": 2}},
)


def parse_command(body: Body) -> Command:
    """Raises InvalidRequest."""
    return _CMD.read(Fields(body))


_DONE = {
    Command.PAUSE: "paused: new inference is refused, running requests may finish",
    Command.PAUSE_ROCE: "paused: new inference is refused, running requests may finish",
    Command.REINIT: "the devices served here need no re-initialisation; ready to be started",
    Command.START: "started: inference is served again",
}


class FaultHandling:
    def __init__(self, settings: EndpointSettings, health: Health) -> None:
        self._settings = settings
        self._health = health

    def routes(self) -> list[web.RouteDef]:
        return [web.post(FAULT_PATH, self._handle)]

    async def _handle(self, request: web.Request) -> web.Response:
        raw = await read_body(request, self._settings.max_request_bytes)
        command = parse_command(parse_body(raw, self._settings.max_json_depth))
        done = self._health.command(command)
        message = _DONE[command] if done else "no model instance can serve; the state is abnormal now"
        return web.json_response({"status": done, "message": message, "reason": self._reasons()})

    def _reasons(self) -> list[dict[str, Any]]:
        """One row per model instance."""
        return [
            {
                "device_id": number,
                "result": "success" if serves else "fail",
                "message": "serving" if serves else "restarting",
            }
            for number, serves in self._health.serving.items()
        ]
