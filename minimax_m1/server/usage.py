"""`GET /v1/usage`: what a key has used, or everybody, by UTC day, hour or key."""

from __future__ import annotations

import asyncio
import logging
import re
import sqlite3
from datetime import datetime, timedelta, timezone
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel, ConfigDict, Field

from minimax_m1.errors import UserError
from minimax_m1.server.accounts import Key
from minimax_m1.server.errors import ERROR_REPLIES, ApiError
from minimax_m1.server.ledger import Period
from minimax_m1.server.service import Service, get_key, get_service

router = APIRouter()
logger = logging.getLogger("minimax_m1.server")

_MOMENT = "a date, which stands for its whole UTC day, a time such as 2026-01-31T23:00:00Z, or Unix seconds"


class UsageQuery(BaseModel):
    """What to add up."""

    model_config = ConfigDict(extra="forbid")

    by: Period = Field("day", description="total: one sum; key: one a key; day, hour: one for each key in each of them")
    since: str | None = Field(None, description=f"requests that came at this time or later: {_MOMENT}")
    until: str | None = Field(None, description=f"requests that came before this time: {_MOMENT}")
    key: str | None = Field(None, description="name of a key; only an admin's key sees others than itself")


class UsageSum(BaseModel):
    """Requests added up. A request counts where it came, when it has ended."""

    key: str | None = Field(description="null: of all keys")
    day: str | None = Field(description="such as 2026-01-31, UTC; null: of all days")
    hour: str | None = Field(description="when the hour began, such as 2026-01-31T23:00:00Z; null: of all hours")
    requests: int
    prompt_tokens: int
    cached_tokens: int = Field(description="of the prompts' tokens, those that the prefix cache had")
    completion_tokens: int
    reasoning_tokens: int = Field(description="of the completions' tokens, those of thinking")
    cost: float
    flops: int


class UsageReply(BaseModel):
    """Sums, the oldest first."""

    object: Literal["list"] = "list"
    currency: str = Field(description="of the costs")
    data: list[UsageSum]


@router.get("/v1/usage", responses=ERROR_REPLIES)
async def usage(
    query: Annotated[UsageQuery, Query()],
    service: Annotated[Service, Depends(get_service)],
    key: Annotated[Key, Depends(get_key)],
) -> UsageReply:
    """Return tokens, costs and FLOPs: a key's own, or for an admin's key and on a server without keys, everybody's."""
    accounts = service.accounts
    since, until = _moment("since", query.since), _moment("until", query.until, end=True)
    whose: Key | None = key
    if key.admin or accounts.is_open:
        whose = None if query.key is None else Key(query.key)
    elif query.key not in (None, key.name):
        raise UserError(f"key: {query.key!r} cannot be used with this key; accepted: its own name, {key.name!r}")
    try:
        sums = await asyncio.to_thread(accounts.usage, whose, since=since, until=until, by=query.by)
    except sqlite3.Error as error:
        logger.error("usage cannot be read: %s", error)
        raise ApiError(503, "the usage cannot be read now", retry_after=5) from error
    return UsageReply(currency=accounts.prices.currency, data=[UsageSum(**row) for row in sums])


def _moment(name: str, text: str | None, *, end: bool = False) -> float | None:
    """Return Unix seconds; of a date, its first ones, or with `end` those of the next day."""
    if text is None:
        return None
    try:
        if re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,9})?", text):
            return float(text)
        is_date = re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", text) is not None
        moment = datetime.fromisoformat(re.sub("[Zz]$", "+00:00", text))  # Python 3.10 knows no Z
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=timezone.utc)
        return (moment + timedelta(days=is_date and end)).timestamp()
    except (ValueError, OverflowError):
        raise UserError(f"{name}: {text!r} cannot be used; accepted: {_MOMENT}") from None
