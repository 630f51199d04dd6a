"""Streams whose client has gone, and answers that take long to write."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Sequence
from typing import cast

import pytest
from aiohttp import ClientPayloadError, ServerDisconnectedError, web
from aiohttp.test_utils import TestClient, TestServer

from endpoint.app import _answer, _errors
from endpoint.generation_stream import GenerationStream
from endpoint.protocols.base import Completion, FinishReason, GenerationRequest, Reply, TokenStep
from endpoint.protocols.mindie_native import NativeReply
from engine.sampling_params import SamplingParams
from tests.endpoint.samples import steps

REQUEST = GenerationRequest("", SamplingParams(8), stream=True)


def test_a_client_that_hangs_up_is_no_failure_of_the_server(caplog: pytest.LogCaptureFixture) -> None:
    """Its connection is closing, but what is buffered for it has kept our handler from being told."""
    ended = []

    async def handle(http: web.Request) -> web.StreamResponse:
        async def stream() -> AsyncIterator[TokenStep]:
            first, *others = steps(["a", "b", "c"])
            yield first
            assert http.transport is not None
            http.transport.close()
            for step in others:
                yield step

        reply = cast(Reply, NativeReply(1, False, False))
        try:
            return await _answer(http, "id", REQUEST, cast(GenerationStream, stream()), reply)
        except ConnectionError:
            ended.append(True)
            raise

    async def run() -> None:
        app = web.Application(middlewares=[_errors])
        app.add_routes([web.get("/", handle)])
        async with TestClient(TestServer(app)) as client:
            with pytest.raises((ClientPayloadError, ServerDisconnectedError)):
                await (await client.get("/")).read()

    with caplog.at_level(logging.WARNING, "server"):
        asyncio.run(asyncio.wait_for(run(), 30))
    assert ended and not caplog.records


class Writer:
    """Notes where it was asked to write."""

    def __init__(self) -> None:
        self.beside = False

    def result(self, completions: Sequence[Completion]) -> bytes:
        self.beside = threading.current_thread() is not threading.main_thread()
        return b"{}"


class Collected:
    def __init__(self, num_tokens: int) -> None:
        ones = [1] * num_tokens
        self._completion = Completion("", ones, FinishReason.LENGTH, None, [1.0] * num_tokens, ones, ones)

    async def collect(self) -> list[Completion]:
        return [self._completion] * 4


@pytest.mark.parametrize(
    ("num_tokens", "logprobs", "beside"), [(20, 5, False), (20, -1, False), (100, 20, True)]
)
def test_long_answers_are_written_beside_the_event_loop(num_tokens: int, logprobs: int, beside: bool) -> None:
    request = GenerationRequest("", SamplingParams(num_tokens, logprobs=logprobs), stream=False)
    writer, stream = Writer(), Collected(num_tokens)
    http = cast(web.Request, None)  # of an answer that is not streamed nothing is asked
    asyncio.run(_answer(http, "id", request, cast(GenerationStream, stream), cast(Reply, writer)))
    assert writer.beside is beside
