"""How chat templates are rendered; and, run as a program, the rendering of one that came with a request.

Such a template is a program of somebody who may mean harm, and the sandbox of jinja2 bounds neither time nor
memory. So it runs in a process of its own, which the kernel ends at its limits: it reads one JSON object with
`template` and `variables` from stdin once it has written a newline to say that it has started, and writes one
with `text`, or with `error` in one line.

Imports nothing of ours: as a program it is started without a path to import from.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
from collections.abc import Mapping
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MOST_CHARACTERS = 4_194_304  # of what a request's template may make, as many as a prompt may have
MEMORY_BYTES = 512 * 2**20
_PROCESSOR_S = 3  # behind the time the parent grants, in case the parent has died
_SHOWN_CHARACTERS = 200
FAULTS = (
    jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError
)  # fmt: skip


class _GenerationBlock(Extension):
    """`{% generation %}` marks what the model wrote, for training. Rendering takes the body as it is."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it as an instance attribute)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False, **options: Any) -> str:
    # jinja's own filter escapes for HTML; a prompt is no HTML
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)


def make_environment() -> ImmutableSandboxedEnvironment:
    """Templates can neither change what they are given nor reach anything but values and these functions."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def shown(error: BaseException) -> str:
    """A fault of a template in one line."""
    if isinstance(error, jinja2.TemplateSyntaxError):
        return f"line {error.lineno}: {error.message}"[:_SHOWN_CHARACTERS]
    return " ".join(str(error).split())[:_SHOWN_CHARACTERS]


def _render(template: str, variables: Mapping[str, Any]) -> dict[str, str]:
    pieces, left = [], MOST_CHARACTERS
    try:
        for piece in make_environment().from_string(template).generate(variables):
            pieces.append(piece)
            left -= len(piece)
            if left < 0:
                return {"error": f"it makes more than {MOST_CHARACTERS} characters"}
    except MemoryError:
        del pieces
        return {"error": f"it takes more than {MEMORY_BYTES >> 20} MiB of memory"}
    except FAULTS as error:
        return {"error": shown(error)}
    except Exception as error:  # code that jinja2 makes may not even compile
        return {"error": type(error).__name__}
    return {"text": "".join(pieces)}


def _warm_up() -> None:
    """Import what jinja2 and its literals and filters import when first used: later no file can be opened."""
    environment = make_environment()
    environment.from_string(
        r"{{ 'a\n' | wordwrap(1) | pprint | urlize | striptags }}{{ lipsum(n=1) }}"
    ).render()
    with contextlib.suppress(jinja2.UndefinedError):
        environment.from_string("{{ a.b }}").render()


def _restrict() -> None:
    """No more than a share of the machine, no files, no further processes."""
    os.nice(10)
    for limit, value in (
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_CPU, _PROCESSOR_S),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 3),
        (resource.RLIMIT_NPROC, 0),
    ):
        resource.setrlimit(limit, (value, value))


def main() -> None:
    _warm_up()
    _restrict()
    sys.stdout.buffer.write(b"\n")
    sys.stdout.buffer.flush()
    asked = json.load(sys.stdin.buffer)
    answer = _render(asked["template"], asked["variables"])
    sys.stdout.buffer.write(json.dumps(answer, ensure_ascii=True).encode())
    sys.stdout.buffer.flush()
    os._exit(0)  # whatever the template has left behind is not worth being taken apart


if __name__ == "__main__":
    main()
