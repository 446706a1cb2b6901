"""What the server says of itself: /health, /ready, /version, /metrics, /v1/models."""

from __future__ import annotations

import asyncio
from datetime import datetime, timezone
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from starlette.responses import Response

from minimax_m1 import __version__
from minimax_m1.server.errors import ERROR_REPLIES, ApiError
from minimax_m1.server.replies import JsonReply
from minimax_m1.server.schemas import Model, ModelList, Status, Version
from minimax_m1.server.service import Service, get_service

router = APIRouter(tags=["server"])

AnyService = Annotated[Service, Depends(get_service)]


@router.get("/health", responses={200: {"model": Status}, 503: {"model": Status}})
async def health(service: AnyService) -> Response:
    """Say whether the engine lives; a server that answers 503 here has to be started anew."""
    if service.async_engine.error is not None:
        return JsonReply({"status": "the engine has stopped"}, 503)
    return JsonReply({"status": "ok"})


@router.get("/ready", responses={200: {"model": Status}, 503: {"model": Status}})
async def ready(service: AnyService) -> Response:
    """Say whether new requests are taken."""
    if service.draining or service.async_engine.error is not None:
        return JsonReply({"status": "draining"}, 503)
    return JsonReply({"status": "ready"})


@router.get("/version", responses={200: {"model": Version}})
async def version() -> Response:
    """Return the package's version."""
    return JsonReply({"version": __version__})


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(service: AnyService) -> Response:
    """Return the metrics for Prometheus."""
    body, content_type = await asyncio.to_thread(service.metrics.render)  # milliseconds
    return Response(body, headers={"Content-Type": content_type})


@router.get("/v1/models", responses={**ERROR_REPLIES, 200: {"model": ModelList}}, tags=["OpenAI"])
async def models(service: AnyService) -> Response:
    """List the served models: one."""
    name = service.model_name
    return JsonReply(
        {"object": "list", "data": [_model(service)], "has_more": False, "first_id": name, "last_id": name}
    )


@router.get("/v1/models/{model:path}", responses={**ERROR_REPLIES, 200: {"model": Model}}, tags=["OpenAI"])
async def model(model: str, service: AnyService) -> Response:
    """Return a served model."""
    service.check_model(model)
    return JsonReply(_model(service))


@router.post("/v1/embeddings", responses=ERROR_REPLIES | {501: ERROR_REPLIES[400]}, tags=["OpenAI"])
async def embeddings() -> Response:
    """Refuse: M1 is no embedding model."""
    raise ApiError(501, "embeddings: are not served; this model writes text")


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.model_name,
        "object": "model",
        "created": service.created,
        "owned_by": "minimax-m1",
        "max_model_len": service.engine.max_model_len,
        "type": "model",
        "display_name": service.model_name,
        "created_at": datetime.fromtimestamp(service.created, timezone.utc).isoformat().replace("+00:00", "Z"),
    }
