"""What became of each request: one line in the request log at its end, and the same for a client that asks.

Lengths, counts, times and ids only: nothing of what was asked or answered.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from aiohttp import web

from endpoint.generation_stream import GenerationStream
from endpoint.request_id import internal_id
from engine.errors import ServerError
from engine.logs import REQUESTS

log = logging.getLogger(REQUESTS)

_ASKED_WITH = "X-MindIE-Timings"  # a request that has it with the value 1 is told its own figures


@dataclass(frozen=True, slots=True)
class Breakdown:
    """Where the time of one request went. The milliseconds but the last add up to the last."""

    prompt_tokens: int
    output_tokens: int
    cached_tokens: int  # of the prompt, found in a prefix cache
    preemptions: int
    queued_ms: float  # waiting: for a place among maxLinkNum, then for its first step in the engine
    prepared_ms: float  # reading the body, checks, chat template, tokenizer, trying out a grammar
    prefill_ms: float  # from the beginning of its first step to its first token
    decode_ms: float  # from there to its last token
    preempted_ms: float  # within that, waiting to go on after it had to give way
    written_ms: float  # from the last token to the end: frames, and a client that reads slowly
    total_ms: float


class RequestRecord:
    """The milestones of one request, set by whoever passes them; monotonic seconds."""

    def __init__(self, request_id: str, client_name: str, route: str) -> None:
        """`request_id`: RequestUUID. `client_name`: from the header req-id, the same when there is none."""
        self.arrival = time.monotonic()
        self.opened: float | None = None  # parsed and checked
        self.admitted: float | None = None
        self.dialect = ""
        self.stream: GenerationStream | None = None
        self._request_id = request_id
        self._client_name = client_name
        self._route = route

    def breakdown(self) -> Breakdown:
        """As of now."""
        end = time.monotonic()
        opened = end if self.opened is None else self.opened
        admitted = end if self.admitted is None else self.admitted
        queued, prepared, stream = admitted - opened, opened - self.arrival, self.stream
        prefill = decode = preempted = written = 0.0
        if stream is None:
            prepared += end - admitted
        else:
            flight, first = stream.flight, stream.first
            prepared += flight.submitted - admitted
            if first is None:
                queued += end - flight.submitted
            else:
                wait = min(first.queue_wait_us / 1e6, first.at - flight.submitted)
                queued += wait
                prefill = first.at - flight.submitted - wait
                decode = flight.last_token - first.at
                preempted = min(flight.preempted_us / 1e6, decode)
                decode -= preempted
                written = end - flight.last_token
        return Breakdown(
            prompt_tokens=stream.context.prompt_tokens if stream else 0,
            output_tokens=stream.output_tokens if stream else 0,
            cached_tokens=sum(stream.flight.cached_tokens) if stream else 0,
            preemptions=stream.flight.preemptions if stream else 0,
            queued_ms=queued * 1e3,
            prepared_ms=prepared * 1e3,
            prefill_ms=prefill * 1e3,
            decode_ms=decode * 1e3,
            preempted_ms=preempted * 1e3,
            written_ms=written * 1e3,
            total_ms=(end - self.arrival) * 1e3,
        )

    def write(self, error: BaseException | None) -> None:
        """The line. `error`: what ended the request before an answer had begun."""
        if not log.isEnabledFor(logging.INFO):
            return
        told = self.breakdown()
        engine = ",".join(str(part.request_id) for part in self.stream.flight.parts) if self.stream else ""
        named = "" if self._client_name == self._request_id else f" req_id={self._client_name}"
        log.info(
            "request=%s%s route=%s dialect=%s end=%s prompt_tokens=%d output_tokens=%d cached_tokens=%d "
            "preemptions=%d queued_ms=%.1f prepared_ms=%.1f prefill_ms=%.1f decode_ms=%.1f preempted_ms=%.1f "
            "written_ms=%.1f total_ms=%.1f engine=%s",
            self._request_id, named, self._route, self.dialect or "-", self._end(error),
            told.prompt_tokens, told.output_tokens, told.cached_tokens, told.preemptions, told.queued_ms,
            told.prepared_ms, told.prefill_ms, told.decode_ms, told.preempted_ms, told.written_ms,
            told.total_ms, engine or "-",
        )  # fmt: skip

    def _end(self, error: BaseException | None) -> str:
        """Finish reasons of its choices, or the code of what ended it."""
        if error is None and self.stream is not None:
            if self.stream.complete:
                return ",".join(self.stream.finishes)
            error = self.stream.flight.failure
        if isinstance(error, ServerError):
            return error.code
        return "client_gone" if isinstance(error, asyncio.CancelledError | ConnectionError) else "failed"


@contextmanager
def recorded(http: web.Request, request_id: str) -> Iterator[RequestRecord]:
    """Writes the line when the block is left, by any door."""
    resource = http.match_info.route.resource
    route = resource.canonical if resource is not None else "-"  # never the path: it is the client's bytes
    record = RequestRecord(request_id, internal_id(http.headers, request_id), route)
    try:
        yield record
    except BaseException as error:
        record.write(error)
        raise
    record.write(None)


def wants_timings(http: web.Request) -> bool:
    """Whether the client asked to be told where the time went."""
    return http.headers.get(_ASKED_WITH) == "1"


def server_timing(told: Breakdown) -> dict[str, str]:
    """The header of a whole answer, in the form of the W3C's Server Timing: dur is milliseconds."""
    times = [
        f"{name.removesuffix('_ms')};dur={value:.1f}"
        for name, value in asdict(told).items()
        if name.endswith("_ms")
    ]
    counts = [f'{name};desc="{value}"' for name, value in asdict(told).items() if not name.endswith("_ms")]
    return {"Server-Timing": ", ".join(times + counts)}


def timing_comment(told: Breakdown) -> bytes:
    """What follows the last frame of a stream: a comment, which readers of server-sent events skip."""
    values = {name: round(value, 1) for name, value in asdict(told).items()}
    return f": timings {json.dumps(values)}\n\n".encode()
