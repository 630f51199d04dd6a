"""Statuses, error classes and bodies of api.md section 2."""

from __future__ import annotations

import json
import re

import pytest

from endpoint import http_errors, models_api
from engine import errors
from engine.errors import ServerError
from tests.endpoint.samples import model_info
from tests.harness import REPO

EXPECTED: list[tuple[ServerError, int, str]] = [
    (errors.InvalidRequest("m"), 422, "Input Validation Error"),
    (errors.NotFound("m"), 404, "NotFoundError"),
    (errors.MethodNotAllowed("m", ("POST",)), 405, "Method Not Allowed"),
    (errors.BodyTooLarge("m"), 413, "Request Entity Too Large"),
    (errors.GenerationRefused("m"), 424, "Generation Error"),
    (errors.GrammarFailed("m"), 424, "Generation Error"),
    (errors.RequestTimeout("m"), 500, "Incomplete Generation"),
    (errors.EngineFailed("m"), 500, "Incomplete Generation"),
    (errors.ServiceUnavailable("m"), 503, "Service Unavailable"),
    (errors.WrongState("m"), 400, "Bad Request"),
    (errors.Unauthorized("m"), 401, "Unauthorized"),
    (errors.QuotaExceeded("m"), 429, "Too Many Requests"),
    (errors.MalformedRequest("m"), 400, "Bad Request"),
    (errors.ForeignOrigin("m"), 403, "Forbidden"),
    (errors.SlowRequest("m"), 408, "Request Timeout"),
    (ServerError("m"), 500, "Incomplete Generation"),
]


@pytest.mark.parametrize(("error", "status", "name"), EXPECTED)
def test_status_and_canonical_body(error: ServerError, status: int, name: str) -> None:
    assert http_errors.status(error) == status
    body = json.loads(http_errors.error_body(error))
    assert {key: body[key] for key in ("error", "error_type", "type")} == {
        "error": "m",
        "error_type": name,
        "type": name,
    }


def test_P14_every_error_type_has_a_row() -> None:
    assert set(http_errors.STATUS) == {ServerError, *ServerError.__subclasses__()}


def test_P14_the_document_has_every_status_and_class() -> None:
    document = (REPO / "docs" / "api.md").read_text(encoding="utf-8").partition("\n## Errors\n")[2]
    rows = re.findall(r"^\| (\d{3}) \| `([^`]+)` \|", document, re.MULTILINE)
    assert sorted((int(status), name) for status, name in rows) == sorted(set(http_errors.STATUS.values()))


def test_a_subtype_takes_the_row_of_its_base() -> None:
    class TooLong(errors.GenerationRefused):
        pass

    assert http_errors.status(TooLong("m")) == 424


def test_an_unexpected_exception_says_nothing_of_itself() -> None:
    """A27."""
    error = KeyError("/secret/path")
    assert http_errors.status(error) == 500
    assert b"secret" not in http_errors.error_body(error)
    assert json.loads(http_errors.error_body(error))["error"]
    assert json.loads(http_errors.error_body(ServerError()))["error"]


def test_a_body_too_large_has_the_message_of_the_manual() -> None:
    body = json.loads(http_errors.error_body(http_errors.body_too_large(40 * 2**20)))
    assert body["message"] == "Request body too large. Maximum allowed size is 40MB."
    assert isinstance(body["error"], str)


def test_headers() -> None:
    assert http_errors.error_headers(http_errors.wrong_method(("GET", "HEAD"))) == {"Allow": "GET, HEAD"}
    busy = errors.ServiceUnavailable("full", retry_after_s=3)
    assert http_errors.error_headers(busy) == {"Retry-After": "3"}
    assert http_errors.error_headers(errors.ServiceUnavailable("stopping")) == {}
    assert http_errors.error_headers(errors.QuotaExceeded("much", 9)) == {"Retry-After": "9"}
    assert http_errors.error_headers(errors.Unauthorized("who")) == {"WWW-Authenticate": "Bearer"}
    assert http_errors.status(http_errors.unknown_path()) == 404


def test_error_text_is_one_line() -> None:
    for break_ in ("\n", "\r", "\u2028", "\x85"):
        assert len(http_errors.error_text(errors.InvalidRequest(f"a{break_}b")).splitlines()) == 1


def test_models() -> None:
    """The example of api.md 10.1."""
    model = model_info("llama")
    card = {
        "id": "llama",
        "object": "model",
        "created": 1744038000,
        "owned_by": "MindIE Server",
        "root": "llama",
        "parent": None,
        "max_model_len": 2560,
    }
    assert json.loads(models_api.model_list(model)) == {"object": "list", "data": [card]}
    assert json.loads(models_api.model_card(model, "llama")) == card
    with pytest.raises(errors.NotFound):
        models_api.model_card(model, "../llama")
