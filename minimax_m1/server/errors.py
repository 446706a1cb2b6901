"""What a client is told when something is wrong: one envelope for OpenAI's routes, one for Anthropic's."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

from minimax_m1.errors import UserError
from minimax_m1.server.accounts import QuotaExceeded
from minimax_m1.server.replies import ClientLeftError, JsonReply, encode_event

logger = logging.getLogger("minimax_m1.server")

# The names of a status in the two APIs.
_OPENAI_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    501: "not_implemented_error",
    503: "overloaded_error",
}
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    501: "api_error",
    503: "overloaded_error",
}
_FIELD = re.compile(r"([A-Za-z_][\w.\[\]]*)(?:, [\w.]+)*(?:: | = )")  # what a UserError's message begins with


class ErrorBody(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """OpenAI's envelope of an error."""

    error: ErrorBody


class AnthropicErrorBody(BaseModel):
    """What is wrong, in Anthropic's API."""

    type: str
    message: str


class AnthropicErrorReply(BaseModel):
    """Anthropic's envelope of an error."""

    type: str
    error: AnthropicErrorBody
    request_id: str | None


_STATUSES = {
    400: "The request cannot be used; the message names the field.",
    401: "The key is missing or wrong.",
    404: "There is no such model, response or route.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    429: "A quota of the key is used up; Retry-After says when to come again.",
    503: "Too many requests wait already, or the server is about to stop.",
}
# For `responses=` of a route, so that /openapi.json tells the whole truth.
ERROR_REPLIES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorReply, "description": text} for status, text in _STATUSES.items()
}
ANTHROPIC_ERROR_REPLIES: dict[int | str, dict[str, Any]] = {
    status: {"model": AnthropicErrorReply, "description": text} for status, text in _STATUSES.items()
}


class ApiError(HTTPException):
    """An error that a route raises for the client to see."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        headers = None if retry_after is None else {"Retry-After": str(retry_after)}
        super().__init__(status, message, headers)
        self.param, self.code = param, code


def renamed(error: UserError, names: Mapping[str, str]) -> UserError:
    """Return a UserError that speaks of a client's fields instead of ours: `names` is ours -> theirs."""
    message = str(error)
    for ours, theirs in names.items():
        message = re.sub(rf"(?<![\w.]){re.escape(ours)}\b", theirs, message)
    return UserError(message)


def as_api_error(error: Exception) -> ApiError:
    """Return what a client is told of an error; nothing of an unexpected one, which belongs in the log."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QuotaExceeded):
        told = ApiError(429, error.message, code="rate_limit_exceeded", retry_after=error.retry_after)
        if not error.fits_later:
            told.headers = {**(told.headers or {}), "x-should-retry": "false"}  # which the official clients heed
        return told
    if isinstance(error, UserError):
        message = str(error)
        field = _FIELD.match(message)
        return ApiError(400, message, param=field[1] if field else None)
    if isinstance(error, RequestValidationError):
        return _as_bad_field(error)
    if isinstance(error, ClientLeftError):
        return ApiError(499, "the client has left")  # only the log sees it; the status is nginx's
    if isinstance(error, HTTPException):  # from the framework: unknown routes, wrong methods, broken bodies
        told = ApiError(error.status_code, str(error.detail))
        told.headers = error.headers
        return told
    if isinstance(error, RecursionError):
        return ApiError(400, "body: is nested too deeply")
    return ApiError(500, "the server has failed; its log has the reason under this request's id")


def error_body(error: ApiError, path: str, request_id: str) -> dict[str, Any]:
    """Return an error in the envelope of the API that `path` belongs to."""
    status, message = error.status_code, str(error.detail)
    if path.startswith("/v1/messages"):
        kind = _ANTHROPIC_TYPES.get(status, "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id}
    kind = _OPENAI_TYPES.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": error.param, "code": error.code}}


def error_reply(error: ApiError, path: str, request_id: str) -> Response:
    """Return the response that carries an error."""
    headers = dict(error.headers or {})
    if error.status_code == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.status_code in (408, 413):
        headers["Connection"] = "close"  # the rest of the body is not wanted
    return JsonReply(error_body(error, path, request_id), error.status_code, headers)


def failed_event(error: Exception, path: str, request_id: str, name: str | None = None) -> bytes:
    """Return the event that ends a stream which cannot go on; what nobody expected goes to the log."""
    told = as_api_error(error)
    if told.status_code == 500:
        logger.error("request %s failed in mid-stream", request_id, exc_info=error)
    return encode_event(error_body(told, path, request_id), name)


def add_error_handlers(app: FastAPI) -> None:
    """Answer every exception in the envelope of the route's API."""

    async def answer(request: Request, error: Exception) -> Response:
        return error_reply(as_api_error(error), request.url.path, request.state.caller.request_id)

    for kind in (HTTPException, RequestValidationError, UserError, QuotaExceeded, ClientLeftError, RecursionError):
        app.add_exception_handler(kind, answer)


def _as_bad_field(error: RequestValidationError) -> ApiError:
    """Say what is wrong with the first bad field of a request."""
    first = error.errors()[0]
    place = [part for part in first["loc"] if part not in ("body", "query", "path")]
    if first["type"] == "json_invalid":
        return ApiError(400, f"body: is not JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    if not place:
        return ApiError(400, "body: cannot be used; accepted: a JSON object, sent as application/json")
    field = str(place[0]) + "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in place[1:])
    if first["type"] == "missing":
        return ApiError(400, f"{field}: is missing", param=field, code="missing_required_parameter")
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{field}: is not known here", param=field, code="unknown_parameter")
    if first["type"] == "value_error":  # from a validator of ours, whose messages name the field
        return ApiError(400, str(first["ctx"]["error"]), param=field)
    alternatives = [other for other in error.errors() if other["loc"][:2] == first["loc"][:2]]
    if len(alternatives) > 1:  # a field that may have one of several types, none of which fits
        field = str(place[0])
    accepted = {other["msg"].removeprefix("Input should be ") for other in alternatives}
    shown = repr(first["input"])
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return ApiError(400, f"{field}: {shown} cannot be used; accepted: {', or '.join(sorted(accepted))}", param=field)


def nearest(name: str, known: list[str]) -> str:
    """Return a hint at the field that was meant, or nothing."""
    near = difflib.get_close_matches(name, known, 1, 0.6)
    return f"; did you mean {near[0]}?" if near else ""
