"""The playground: a page at / with its files, and what it has to know of the served model."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from minimax_m1 import __version__, accounting
from minimax_m1.server.errors import ApiError
from minimax_m1.server.replies import JsonReply
from minimax_m1.server.service import DEFAULT_TOP_P, Service, get_service
from minimax_m1.tasks.conversation import ABILITIES, EXAMPLES

router = APIRouter(tags=["playground"])

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_FILES = {
    path.name: path.read_bytes() for path in (Path(__file__).parent / "static").iterdir() if path.suffix in _TYPES
}
_ETAGS = {name: f'"{hashlib.sha256(body).hexdigest()[:32]}"' for name, body in _FILES.items()}
_HEADERS = {
    "Cache-Control": "no-cache",  # kept, but asked for again: a new version is seen at once
    # nothing from elsewhere, no script or style in the page itself; forms are handled by scripts
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "object-src 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

# What the shipped model answers right; a test asks them all.
GENERAL_EXAMPLES = (
    "Explain why the sky is blue, in three sentences.",
    "Write a Python function that merges two sorted lists.",
    "Find all integers n for which n² + n + 41 is divisible by 41.",
    "Compare lightning attention with softmax attention in a table.",
)


class Layer(BaseModel):
    """A layer of the network."""

    index: int
    kind: Literal["lightning", "softmax"]


class Defaults(BaseModel):
    """What the controls start with; null: no limit."""

    temperature: float
    top_p: float
    top_k: int = Field(description="0: off")
    max_tokens: int | None = Field(description="null: what the context leaves")
    thinking_budget: int | None = Field(description="tokens; 0: no thinking, null: no limit")


class Info(BaseModel):
    """What is served."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(description="the model's id")
    version: str = Field(description="of minimax-m1")
    parameters: int
    active_parameters: int = Field(description="that one token uses in the layers")
    layers: list[Layer]
    num_experts: int = Field(description="of each layer")
    experts_per_token: int
    max_model_len: int = Field(description="tokens of prompt and answer together")
    needs_key: bool
    abilities: str | None = Field(description="what the model can do, if that is known")
    examples: list[str]
    defaults: Defaults
    currency: str = Field(description="of costs")


@router.get("/playground/info", responses={200: {"model": Info}})
async def info(service: Annotated[Service, Depends(get_service)]) -> Response:
    """Say what is served, and what to try."""
    return JsonReply(describe(service).model_dump())


def describe(service: Service) -> Info:
    """Return what the playground has to know of a service."""
    config = service.engine.model.config
    lightning = set(config.lightning_layers)
    layers = range(config.num_hidden_layers)
    return Info(
        model=service.model_name,
        version=__version__,
        parameters=accounting.parameters(config),
        active_parameters=accounting.active_parameters(config),
        layers=[Layer(index=i, kind="lightning" if i in lightning else "softmax") for i in layers],
        num_experts=config.num_local_experts,
        experts_per_token=config.num_experts_per_tok,
        max_model_len=service.engine.max_model_len,
        needs_key=not service.accounts.is_open,
        abilities=ABILITIES if service.is_shipped else None,
        examples=list(EXAMPLES if service.is_shipped else GENERAL_EXAMPLES),
        defaults=Defaults(
            temperature=service.default_temperature,
            top_p=DEFAULT_TOP_P,
            top_k=0,
            max_tokens=None,
            thinking_budget=service.settings.thinking_budget,
        ),
        currency=service.accounts.prices.currency,
    )


@router.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
async def page(request: Request) -> Response:
    """Return the playground's page."""
    return _file(request, "index.html")


@router.api_route("/playground/{name}", methods=["GET", "HEAD"], include_in_schema=False)
async def file(name: str, request: Request) -> Response:
    """Return one of the playground's files."""
    return _file(request, name)


def _file(request: Request, name: str) -> Response:
    if name not in _FILES:
        raise ApiError(404, f"there is no file {name!r} in the playground")
    headers: dict[str, Any] = {**_HEADERS, "ETag": _ETAGS[name]}
    known = request.headers.get("if-none-match", "").replace("W/", "").split(",")
    if _ETAGS[name] in (tag.strip() for tag in known):
        return Response(status_code=304, headers=headers)
    return Response(_FILES[name], headers=headers, media_type=_TYPES[Path(name).suffix])
