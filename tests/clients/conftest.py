"""One daemon of each kind for all clients: what one client leaves behind, the next one meets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.harness import HOST, TINY_MODEL, Daemon, Installation, model_config


@pytest.fixture(scope="package")
def server(installation: Installation) -> Iterator[Daemon]:
    """A running daemon over plain HTTP."""
    daemon = installation.daemon().start().wait_ready()
    yield daemon
    assert daemon.stop() == 0, daemon.stderr


@pytest.fixture(scope="package")
def https_server(installation: Installation) -> Iterator[Daemon]:
    """A running daemon under mutual TLS; its model has the name that the manual's examples use."""
    model = model_config(modelName="llama", modelWeightPath=str(TINY_MODEL))
    daemon = installation.daemon(model, https=True).start().wait_ready()
    yield daemon
    assert daemon.stop() == 0, daemon.stderr


@pytest.fixture(scope="package")
def sdk_arguments(server: Daemon) -> dict[str, Any]:
    """Of openai's clients. Without retries: a wrong 5xx is to fail a test, not to be asked again."""
    base_url = f"http://{HOST}:{server.port}/v1"
    return {"base_url": base_url, "api_key": "anything", "max_retries": 0, "timeout": 60.0}


@pytest.fixture(scope="package")
def sdk(sdk_arguments: dict[str, Any]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(**sdk_arguments) as sdk:
        yield sdk
