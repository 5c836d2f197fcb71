"""Errors in the form of OpenAI's API, and the HTTP status of hotloop's own errors."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from hotloop.errors import (
    CheckpointError,
    ContextLengthError,
    GrammarError,
    HotloopError,
    NumericsError,
    QueueFullError,
    RequestError,
    ServiceClosedError,
    SlowClientError,
    UnsupportedError,
    shorten,
)

RETRY_AFTER_S = 1

CLIENT_CLOSED_REQUEST = 499
"""The status for a client that has disconnected, as in nginx. Only the log shows it."""


class ApiError(Exception):
    """An error response.

    Args:
        status: The HTTP status.
        message: The problem, and the fix.
        type: The kind of error, by OpenAI's names.
        param: The field of the request at fault.
        code: A machine-readable name.
        headers: Headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",  # noqa: A002  (the field's name)
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers
        self.message, self.type, self.param, self.code = message, type, param, code

    @property
    def body(self) -> dict[str, object]:
        """The error as JSON, of a response or of an event of a stream."""
        fields = {name: getattr(self, name) for name in ("message", "type", "param", "code")}
        return {"error": fields}

    def response(self) -> Response:
        """Returns the HTTP response."""
        return JSONResponse(self.body, self.status, headers=self.headers)


def as_api_error(error: Exception) -> ApiError:
    """Returns the error response for an exception."""
    match error:
        case ApiError():
            return error
        case ContextLengthError():
            return ApiError(
                400,
                f"This model's maximum context length is {error.context} tokens: {error}",
                code="context_length_exceeded",
            )
        case QueueFullError():
            return ApiError(
                429,
                str(error),
                type="rate_limit_error",
                code="queue_full",
                headers={"Retry-After": str(RETRY_AFTER_S)},
            )
        case ServiceClosedError():
            return unavailable(str(error))
        case SlowClientError():
            return ApiError(408, str(error), type="timeout_error", code="slow_client")
        case RequestError() | UnsupportedError() | CheckpointError():
            return ApiError(400, str(error))
        case GrammarError():
            return ApiError(400, str(error), code="grammar_too_costly")
        case NumericsError():
            return ApiError(500, str(error), type="server_error", code="not_finite")
        case HotloopError():
            return ApiError(500, str(error), type="server_error", code="engine_failed")
        case ClientDisconnect():
            return ApiError(CLIENT_CLOSED_REQUEST, "the client has disconnected.")
        case HTTPException():
            return ApiError(error.status_code, shorten(error.detail), headers=error.headers)
        case _:
            return ApiError(
                500,
                "the server failed on this request because of a bug in hotloop: see the server's "
                "log.",
                type="server_error",
                code="internal_error",
            )


def invalid_value(place: str, problem: str) -> ApiError:
    """Returns the error of a request with an invalid value.

    Args:
        place: The place of the value in the request, such as ``messages[0].role``.
        problem: The problem, which follows the place in the message.
    """
    return ApiError(400, f"{place}: {problem}", param=place, code="invalid_value")


def unavailable(message: str) -> ApiError:
    """Returns the error of a server that currently takes no requests."""
    return ApiError(
        503,
        message,
        type="service_unavailable",
        code="not_ready",
        headers={"Retry-After": str(RETRY_AFTER_S)},
    )


async def handle(request: Request, error: Exception) -> Response:
    """Answers a request that raised an error."""
    api_error = as_api_error(error)
    if isinstance(error, HTTPException) and api_error.status in (404, 405):  # of the router
        route = f"{request.method} {shorten(request.url.path)}"
        api_error.message = f"there is no route {route} here: the base URL of clients ends in /v1."
    if api_error.status != CLIENT_CLOSED_REQUEST:
        request.app.state.served.metrics.error(api_error.status)
    return api_error.response()
