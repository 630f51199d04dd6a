"""The bytes of a request's body, within the limits of the configuration."""

from __future__ import annotations

from aiohttp import web

from endpoint import http_errors
from engine.errors import InvalidRequest


async def read_body(http: web.Request, max_bytes: int) -> bytes:
    """Raises BodyTooLarge or InvalidRequest. `max_bytes`: a whole number of MiB."""
    encodings = http.headers.getall("Content-Encoding", ())
    if any(encoding.lower() != "identity" for encoding in encodings):
        raise InvalidRequest("`Content-Encoding` must be identity; send the body uncompressed")
    if "Inference-Header-Content-Length" in http.headers:  # KServe's way to append raw bytes to the JSON
        raise InvalidRequest("binary tensors are not read here; send `data` as a list of numbers in the JSON")
    if (http.content_length or 0) > max_bytes:
        raise http_errors.body_too_large(max_bytes)  # before it is read
    try:
        return await http.read()
    except web.HTTPRequestEntityTooLarge:
        raise http_errors.body_too_large(max_bytes) from None
    except web.RequestPayloadError:
        raise InvalidRequest("the body ended early or its chunks are malformed; send it again") from None
