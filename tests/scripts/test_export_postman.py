"""The Postman collection: what the script makes now, and every route of the interface in it."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from endpoint.openapi import openapi_document
from endpoint.protocols.registry import load_adapters

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "export_postman.py"
_spec = importlib.util.spec_from_file_location("export_postman", SCRIPT)
assert _spec is not None
assert _spec.loader is not None
export_postman = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(export_postman)

COLLECTION: dict[str, Any] = json.loads(export_postman.COLLECTION.read_text(encoding="utf-8"))


def requests() -> Iterator[dict[str, Any]]:
    for folder in COLLECTION["item"]:
        for item in folder["item"]:
            yield item["request"]


def test_the_committed_collection_is_up_to_date() -> None:
    """If this fails: run scripts/export_postman.py and commit what it writes."""
    result = subprocess.run([sys.executable, SCRIPT, "--check"], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


def test_an_outdated_collection_is_found_and_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "collection.json"
    monkeypatch.setattr(export_postman, "COLLECTION", file)
    assert (
        export_postman.main(["--check"]) == 1 and "run scripts/export_postman.py" in capsys.readouterr().err
    )
    file.write_text("{}")
    assert export_postman.main(["--check"]) == 1
    assert export_postman.main([]) == 0 and json.loads(file.read_text()) == COLLECTION
    assert export_postman.main(["--check"]) == 0


def test_every_route_is_in_it() -> None:
    document = openapi_document(load_adapters(), "x")
    wanted = {
        (method.upper(), path.replace("{model}", "{{model}}").replace("{seconds}", "10"))
        for path, item in document["paths"].items()
        for method in item.keys() & {"get", "post"}
    }
    found = {(request["method"], "/" + "/".join(request["url"]["path"])) for request in requests()}
    assert found == wanted


def test_requests_are_whole() -> None:
    variables = {variable["key"] for variable in COLLECTION["variable"]}
    assert variables == {"business", "management", "metrics", "model"}
    for request in requests():
        assert request["url"]["raw"] == "/".join([*request["url"]["host"], *request["url"]["path"]])
        assert set(re.findall(r"\{\{(\w+)\}\}", json.dumps(request))) <= variables
        if request["method"] == "POST":
            assert isinstance(json.loads(request["body"]["raw"]), dict)
    names = [item["name"] for folder in COLLECTION["item"] for item in folder["item"]]
    assert len(names) == len(set(names))


def test_stopping_the_service_is_the_last_thing() -> None:
    """Whoever runs the whole collection wants the other answers first."""
    assert list(requests())[-1]["url"]["path"] == ["stopService"]
