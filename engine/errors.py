"""What can go wrong, as types. Nothing here has heard of HTTP; endpoint/http_errors.py has the statuses."""

from __future__ import annotations


class ServerError(Exception):
    """Base of everything a client may be told about. The text is the client's message.

    `code` is stable and machine-readable; `number` is how it travels in a token record.
    """

    code = "internal"
    number = 1
    request_id = ""  # RequestUUID of the answer that a frame with this error ends


class InvalidRequest(ServerError):
    """The body is wrong in a way that can be known from the body alone."""

    code = "invalid_request"
    number = 2


class NotFound(ServerError):
    """Unknown path, model in a path, or id."""

    code = "not_found"
    number = 3


class MethodNotAllowed(ServerError):
    code = "method_not_allowed"
    number = 4

    def __init__(self, message: str, allowed: tuple[str, ...]) -> None:
        super().__init__(message)
        self.allowed = allowed


class BodyTooLarge(ServerError):
    code = "body_too_large"
    number = 5


class GenerationRefused(ServerError):
    """Well formed, but the engine cannot serve it: too long, id outside the vocabulary, no cache for it."""

    code = "generation_refused"
    number = 6


class RequestTimeout(ServerError):
    """One of tokenTimeout, e2eTimeout or the client's own timeout has passed."""

    code = "timeout"
    number = 7


class EngineFailed(ServerError):
    """The engine died, or produced something that is no result, while the request was running."""

    code = "engine_failed"
    number = 8


class ServiceUnavailable(ServerError):
    """Not ready, stopping, or full."""

    code = "unavailable"
    number = 9

    def __init__(self, message: str, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class WrongState(ServerError):
    """A legal request that this server, as it is now, does not carry out."""

    code = "wrong_state"
    number = 10


class GrammarFailed(ServerError):
    """The answer cannot go on in the format that was asked for: too complex to follow, or a dead end."""

    code = "grammar_failed"
    number = 11


class MalformedRequest(ServerError):
    """The bytes are no HTTP request that this server takes; whatever route they were meant for."""

    code = "malformed_request"
    number = 12


class Unauthorized(ServerError):
    """No API key came with the request, or one that nobody has, where keys are configured."""

    code = "unauthorized"
    number = 13


class QuotaExceeded(ServerError):
    """The client's API key has reached a limit of its own; others are served."""

    code = "quota_exceeded"
    number = 14

    def __init__(self, message: str, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class SlowRequest(ServerError):
    """The request did not arrive in time; nothing was done about it."""

    code = "slow_request"
    number = 20


class ForeignOrigin(ServerError):
    """A control request that a page of another origin made a browser send, or whose Host is not ours."""

    code = "foreign_origin"
    number = 21


class StartupError(Exception):
    """The service cannot start. One clear line, and the exit code of operations.md section 1."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class EngineBug(AssertionError):
    """An invariant of our own does not hold."""


EXIT_OK = 0
EXIT_CONFIG = 1
EXIT_USAGE = 2
EXIT_ADDRESS = 3
EXIT_TLS = 4
EXIT_INIT = 5
EXIT_CHILD_DIED = 6
EXIT_IPC = 7
