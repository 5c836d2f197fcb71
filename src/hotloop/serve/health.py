"""``/health`` and ``/ready``: whether the server works, and whether it takes requests."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from hotloop.serve.served import Served


async def health(request: Request) -> Response:
    """Tells by the status whether requests are answered: 200, or 503 with the reason."""
    served: Served = request.app.state.served
    status = served.status
    body: dict[str, str] = {"status": status}
    if (error := served.error) is not None:
        body["error"] = str(error)
    return JSONResponse(body, 200 if status == "ready" else 503)
