"""Bodies of requests: read within limits, parsed as JSON, validated."""

from __future__ import annotations

import asyncio
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.requests import Request

from hotloop.errors import shorten, shorten_value
from hotloop.serve.errors import ApiError
from hotloop.serve.settings import ServerSettings
from hotloop.untrusted import is_deeper

T = TypeVar("T", bound=BaseModel)

LARGE_BYTES = 16 * 2**10
"""The most bytes of text that are processed in the event loop; more are left to another thread."""


async def read(request: Request, of: type[T], settings: ServerSettings) -> T:
    """Reads the body of a request.

    Args:
        request: The request.
        of: The model of the body.
        settings: The limits.

    Raises:
        ApiError: It is too large, not JSON, nested too deep, or not valid.
        ClientDisconnect: The client has disconnected.
    """
    data = await _data(request, settings.max_body_bytes)
    if len(data) > LARGE_BYTES:
        return await asyncio.to_thread(_parse, data, of, settings.max_depth)
    return _parse(data, of, settings.max_depth)


async def _data(request: Request, limit: int) -> bytes:
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > limit:
        raise _too_large(limit)
    data = bytearray()
    async for piece in request.stream():
        data += piece
        if len(data) > limit:
            raise _too_large(limit)
    return bytes(data)


def _too_large(limit: int) -> ApiError:
    return ApiError(
        413,
        f"the request body exceeds the limit of {limit:,} bytes: send less.",
        code="request_too_large",
    )


def _parse(data: bytes, of: type[T], max_depth: int) -> T:
    try:
        value = from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}.", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, f"the body must be a JSON object, not {shorten_value(value)}.")
    n_brackets = data.count(b"[") + data.count(b"{")  # an upper bound of the depth, and fast
    if n_brackets > max_depth and is_deeper(value, max_depth):
        raise ApiError(
            400, f"the body is nested deeper than {max_depth} levels.", code="invalid_json"
        )
    try:
        return of.model_validate({k: v for k, v in value.items() if v is not None})
    except ValidationError as error:
        first, *_ = error.errors(include_url=False, include_context=False)
        where = shorten(".".join(map(str, first["loc"]))) or None
        problem = first["msg"].removeprefix("Value error, ")
        given = "" if first["type"] == "missing" else f", not {shorten_value(first['input'])}"
        raise ApiError(
            400, f"{where or 'the body'}: {problem}{given}.", param=where, code="invalid_value"
        ) from None
