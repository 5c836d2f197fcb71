"""``/v1/models``: the one model that is served."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from hotloop.serve.served import ServedModel


async def models(request: Request) -> Response:
    """Lists the model."""
    return JSONResponse({"object": "list", "data": [_model(request.app.state.served)]})


async def model(request: Request) -> Response:
    """Describes the model with this name."""
    served: ServedModel = request.app.state.served
    served.check_name(request.path_params["name"])
    return JSONResponse(_model(served))


def _model(served: ServedModel) -> dict[str, Any]:
    return {
        "id": served.settings.name,
        "object": "model",
        "created": served.created,
        "owned_by": "hotloop",
        "max_model_len": served.model.description.max_seq_len,
    }
