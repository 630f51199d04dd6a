#!/usr/bin/env python3
"""The server's interface as a Postman collection, made of its OpenAPI document.

    python scripts/export_postman.py [--check]

Writes docs/mindie.postman_collection.json; with --check nothing is written, and the exit code is 1 when the
file is not what would be written. Import it into Postman, then set the collection's variables: the addresses
of the planes, and the name of the served model.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the packages beside this folder

from endpoint.openapi import openapi_document
from endpoint.protocols.registry import load_adapters

Json = dict[str, Any]

COLLECTION = Path(__file__).resolve().parent.parent / "docs" / "mindie.postman_collection.json"
_SCHEMA = "https://schema.getpostman.com/json/collection/v2.1.0/collection.json"
_MODEL = "mindie-tiny"
_VALUES = {"model": "{{model}}", "seconds": "10"}  # of parameters in paths


def collection(document: Json) -> Json:
    """Collection format 2.1: a folder per family, a request per example."""
    folders: dict[str, list[Json]] = {}
    for path, item in document["paths"].items():
        for method in ("get", "post"):
            if method in item:
                operation = item[method]
                folder = folders.setdefault(operation["x-family"], [])
                folder.extend(_requests(method, path, operation))
    info = document["info"]
    addresses = {item[method]["tags"][0]: item["servers"][0]["url"] for item, method in _operations(document)}
    return {
        "info": {
            "name": info["title"],
            "description": f"{info['description']} Set the variables to the addresses of your server.",
            "schema": _SCHEMA,
        },
        "item": [{"name": name, "item": requests} for name, requests in folders.items()],
        "variable": [
            *({"key": plane, "value": url, "type": "string"} for plane, url in addresses.items()),
            {"key": "model", "value": _MODEL, "type": "string"},
        ],
    }


def _operations(document: Json) -> Iterator[tuple[Json, str]]:
    for item in document["paths"].values():
        for method in ("get", "post"):
            if method in item:
                yield item, method


def _requests(method: str, path: str, operation: Json) -> Iterator[Json]:
    steps = [re.sub(r"\{(\w+)\}", lambda found: _VALUES[found[1]], step) for step in path.split("/")[1:]]
    base = f"{{{{{operation['tags'][0]}}}}}"
    url: Json = {"raw": "/".join([base, *steps]), "host": [base], "path": steps}
    queries = [parameter for parameter in operation.get("parameters", []) if parameter["in"] == "query"]
    if queries:
        url["query"] = [
            {
                "key": query["name"],
                "value": query["schema"]["enum"][0],
                "description": query["description"],
                "disabled": True,
            }
            for query in queries
        ]
    request: Json = {"method": method.upper(), "header": [], "url": url, "description": operation["summary"]}
    content = operation.get("requestBody", {}).get("content", {}).get("application/json")
    if content is None:
        yield {"name": path, "request": request}
        return
    for title, example in content["examples"].items():
        value = example["value"]
        body = {
            "mode": "raw",
            "raw": json.dumps({**value, "model": "{{model}}"} if "model" in value else value, indent=2),
            "options": {"raw": {"language": "json"}},
        }
        header = [{"key": "Content-Type", "value": "application/json"}]
        yield {"name": f"{path}: {title}", "request": {**request, "header": header, "body": body}}


def text() -> str:
    """The whole file."""
    made = collection(openapi_document(load_adapters(), _MODEL))
    return json.dumps(made, indent=1, ensure_ascii=False) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--check", action="store_true", help="only say whether the file is up to date")
    check = parser.parse_args(arguments).check
    wanted = text()
    if check:
        if COLLECTION.is_file() and COLLECTION.read_text(encoding="utf-8") == wanted:
            return 0
        print(f"{COLLECTION} is not up to date; run scripts/export_postman.py", file=sys.stderr)
        return 1
    COLLECTION.write_text(wanted, encoding="utf-8")
    print(f"wrote {COLLECTION}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
