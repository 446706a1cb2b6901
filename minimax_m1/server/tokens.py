"""POST /tokenize and /detokenize: text to ids and back, as vLLM has them."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from pydantic import Field
from starlette.responses import Response

from minimax_m1.errors import UserError
from minimax_m1.server.errors import ERROR_REPLIES, renamed
from minimax_m1.server.replies import JsonReply
from minimax_m1.server.requests import Body
from minimax_m1.server.schemas import Detokenized, Tokenized
from minimax_m1.server.service import LONG_TEXT, Service, get_service

router = APIRouter(tags=["tokens"])


class TokenizeRequest(Body):
    """A text, or a conversation that the chat template is to render."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = Field(None, description="changes nothing: M1's tokenizer adds none to a text")
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    """Token ids."""

    model: str | None = None
    tokens: list[int]


@router.post("/tokenize", responses={**ERROR_REPLIES, 200: {"model": Tokenized}})
async def tokenize(body: TokenizeRequest, service: Annotated[Service, Depends(get_service)]) -> Response:
    """Return the ids of a text or a conversation."""
    service.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise UserError("prompt: is needed, or messages; accepted: exactly one of the two")
    if body.prompt is not None:
        ids = await service.encode(body.prompt)
    else:
        ids = await service.chat_prompt(
            body.messages or [],
            body.tools,
            add_generation_prompt=body.add_generation_prompt is not False,
            continue_final_message=bool(body.continue_final_message),
        )
    return JsonReply(
        {
            "count": len(ids),
            "max_model_len": service.engine.max_model_len,
            "tokens": ids,
            "token_strs": service.token_texts(ids) if body.return_token_strs else None,
        }
    )


@router.post("/detokenize", responses={**ERROR_REPLIES, 200: {"model": Detokenized}})
async def detokenize(body: DetokenizeRequest, service: Annotated[Service, Depends(get_service)]) -> Response:
    """Return the text of ids."""
    service.check_model(body.model)
    try:
        if len(body.tokens) > LONG_TEXT:
            text = await asyncio.to_thread(service.tokenizer.decode, body.tokens)
        else:
            text = service.tokenizer.decode(body.tokens)
    except UserError as error:
        raise renamed(error, {"token id": "tokens"}) from None
    return JsonReply({"prompt": text})
