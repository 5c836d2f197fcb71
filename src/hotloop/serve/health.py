"""``/health`` and ``/ready``: whether the server takes requests; ``/metrics``: for Prometheus."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from hotloop.serve.served import ServedModel


async def health(request: Request) -> Response:
    """Answers 200 if the server takes requests, or 503 with the reason."""
    served: ServedModel = request.app.state.served
    status = served.status
    body: dict[str, str] = {"status": status}
    if (error := served.error) is not None:
        body["error"] = str(error)
    return JSONResponse(body, 200 if status == "ready" else 503)


async def metrics(request: Request) -> Response:
    """Returns the metrics in the exposition format of Prometheus that the client accepts."""
    served: ServedModel = request.app.state.served
    accept = request.headers.get("accept", "")
    body, content_type = await asyncio.to_thread(served.metrics.exposition, accept)
    return Response(body, headers={"Content-Type": content_type})
