"""`chat_template` of a request: rendered in a process of its own, which is ended when it takes too long."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from endpoint import template_child
from endpoint.chat_template import is_file_name
from endpoint.validation import show
from engine.errors import InvalidRequest, ServiceUnavailable

_PROGRAM = template_child.__file__
_RENDER_S = 2.0
_START_S = 30.0  # until the process is there: the machine's business, not the template's
_AT_ONCE = 2  # further ones wait: a crowd of slow templates must not take the machine
_MOST_BYTES = 6 * template_child.MOST_CHARACTERS + 64  # of an answer; a character is at most \uXXXX
_KEPT_VARIABLES = ("LD_LIBRARY_PATH", "TZ", "LC_ALL", "LANG")
_ADVICE = "correct it, or leave it out to use the model's own"


class ClientTemplates:
    """Renders templates of requests. One per endpoint process."""

    def __init__(self, model_dir: Path) -> None:
        self._model_dir = model_dir
        self._turns = asyncio.Semaphore(_AT_ONCE)

    async def render(self, template: str, variables: Mapping[str, Any]) -> str:
        """`template`: as the request has it. Raises InvalidRequest when nothing comes of it."""
        request = json.dumps({"template": self._source(template), "variables": variables}).encode()
        async with self._turns:
            answer = await _ask(request)
        if "error" in answer:
            raise InvalidRequest(f"`chat_template` fails on this request: {answer['error']}; {_ADVICE}")
        text = answer["text"]
        try:
            text.encode()
        except UnicodeEncodeError:  # half of a surrogate pair, written as an escape
            raise InvalidRequest(
                f"`chat_template` makes what is no text in any encoding; {_ADVICE}"
            ) from None
        return text

    def _source(self, template: str) -> str:
        """The text itself, or what the file in the model's directory holds."""
        if not is_file_name(template):
            return template
        try:
            return (self._model_dir / template).read_text(encoding="utf-8")
        except (OSError, ValueError):
            raise InvalidRequest(
                f"`chat_template` is {show(template)}, but the model's directory has no such file that can "
                f"be read as text; {_ADVICE}"
            ) from None


async def _ask(request: bytes) -> dict[str, str]:
    try:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-I",
            _PROGRAM,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env={name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ},
        )
    except OSError as error:
        raise ServiceUnavailable(
            f"no process can be started for `chat_template` ({error.strerror}); try again later",
            retry_after_s=1,
        ) from None
    assert process.stdin is not None and process.stdout is not None
    try:
        try:
            await asyncio.wait_for(process.stdout.readexactly(1), _START_S)
        except (asyncio.TimeoutError, asyncio.IncompleteReadError):
            raise ServiceUnavailable(
                "the process for `chat_template` does not start; try again later", retry_after_s=1
            ) from None
        try:
            return await asyncio.wait_for(_exchange(process.stdin, process.stdout, request), _RENDER_S)
        except (asyncio.TimeoutError, ValueError, OSError):
            # too slow, killed by the kernel at a limit, or not our program any more: all the same to a client
            return {"error": f"it takes more than {_RENDER_S:g} s, or too much memory"}
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        while await process.stdout.read(1 << 16):
            pass  # a pipe that is not empty keeps `wait` from returning
        await process.wait()


async def _exchange(
    stdin: asyncio.StreamWriter, stdout: asyncio.StreamReader, request: bytes
) -> dict[str, str]:
    """Raises ValueError for an answer that is none, OSError when the process ends early."""
    stdin.write(request)
    await stdin.drain()
    stdin.close()
    answer = bytearray()
    while piece := await stdout.read(1 << 16):
        answer += piece
        if len(answer) > _MOST_BYTES:
            raise ValueError
    said: dict[str, str] = json.loads(answer)
    ((name, value),) = said.items()
    if name not in ("text", "error") or not isinstance(value, str):
        raise ValueError
    return said
