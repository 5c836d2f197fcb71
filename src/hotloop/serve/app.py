"""``create_app``: the routes, and the middleware around them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.routing import Route
from starlette.types import ASGIApp

from hotloop.errors import HotloopError
from hotloop.serve.access_log import RequestLog
from hotloop.serve.chat import chat_completions
from hotloop.serve.completions import completions
from hotloop.serve.errors import ApiError, handle
from hotloop.serve.gate import Gate
from hotloop.serve.health import health, metrics
from hotloop.serve.models import model, models
from hotloop.serve.page import chat_page
from hotloop.serve.responses import responses
from hotloop.serve.served import ServedModel
from hotloop.serve.tokens import detokenize, tokenize, tokenizer_info


def create_app(served: ServedModel, access_log: Callable[[str], None] | None = None) -> ASGIApp:
    """Makes the application that serves a model.

    Args:
        served: The served model, which may still be loading.
        access_log: Called with a line about each request; None logs nothing.
    """
    app = Starlette(
        routes=[
            Route("/", chat_page),
            Route("/v1/chat/completions", chat_completions, methods=["POST"]),
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/responses", responses, methods=["POST"]),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            Route("/tokenize", tokenize, methods=["POST"]),
            Route("/detokenize", detokenize, methods=["POST"]),
            Route("/tokenizer_info", tokenizer_info),
            Route("/health", health),
            Route("/ready", health),
            Route("/metrics", metrics),
        ],
        middleware=[
            *_cors(served.settings.cors_origins),
            Middleware(Gate, settings=served.settings),
        ],
        exception_handlers=dict.fromkeys(
            (ApiError, HotloopError, HTTPException, ClientDisconnect, Exception), handle
        ),
    )
    app.state.served = served
    return RequestLog(app, access_log)  # outermost: a response to an internal error has an id, too


def _cors(origins: Sequence[str]) -> list[Middleware]:
    """Allows requests from pages of some origins, without credentials such as cookies."""
    if not origins:
        return []
    allowed = {"allow_origins": origins, "allow_methods": ["GET", "POST"], "allow_headers": ["*"]}
    return [Middleware(CORSMiddleware, **allowed, max_age=3600)]
