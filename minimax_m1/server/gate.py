"""The gate that every request passes: its id, its key, the size and time of its body, its line in the access log."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from datetime import datetime, timezone

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minimax_m1.server.accounts import ANONYMOUS, Key
from minimax_m1.server.errors import ApiError, as_api_error, error_reply
from minimax_m1.server.replies import new_id
from minimax_m1.server.service import Caller, Service

logger = logging.getLogger("minimax_m1.server")
access_log = logging.getLogger("minimax_m1.access")

BODY_SECONDS = 60.0  # that a client may take between two pieces of its body
_GUARDED = ("/v1/", "/tokenize", "/detokenize")  # paths that need a key
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")  # of a client's own ids; others are replaced


class Gate:
    """ASGI middleware around the whole app; it leaves a `Caller` in `request.state.caller`."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        key = self._key(scope, headers)
        caller = Caller(key or ANONYMOUS, given if _REQUEST_ID.fullmatch(given) else new_id("req_"))
        scope.setdefault("state", {})["caller"] = caller
        status, has_started = 499, False  # 499: the client left before there was one

        async def send_with_id(message: Message) -> None:
            nonlocal status, has_started
            if message["type"] == "http.response.start":
                status, has_started = message["status"], True
                headers_out = MutableHeaders(scope=message)
                headers_out["X-Request-Id"] = caller.request_id
                if scope["path"].startswith("/v1/messages"):
                    headers_out["request-id"] = caller.request_id  # Anthropic's name of it
            await send(message)

        try:
            refusal = self._refusal(scope, headers, key)
            if refusal is not None:
                await error_reply(refusal, scope["path"], caller.request_id)(scope, receive, send_with_id)
            else:
                await self._app(scope, self._limited(receive), send_with_id)
        except Exception as error:
            logger.exception("request %s failed", caller.request_id)
            if has_started:
                raise  # so that the connection ends, which tells the client
            await error_reply(as_api_error(error), scope["path"], caller.request_id)(scope, receive, send_with_id)
        finally:
            self._log(scope, caller, status, time.monotonic() - started)

    def _key(self, scope: Scope, headers: Headers) -> Key | None:
        """Return whose key the request has; None: it needs one, and has none that is known."""
        if not scope["path"].startswith(_GUARDED) or scope["method"] == "OPTIONS":
            return ANONYMOUS
        scheme, _, secret = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            secret = headers.get("x-api-key", "")  # Anthropic's
        return self._service.accounts.identify(secret.strip() or None)

    def _refusal(self, scope: Scope, headers: Headers, key: Key | None) -> ApiError | None:
        """Return why the request is refused before its body is read."""
        if key is None:
            return ApiError(
                401, "Authorization: the key is missing or wrong; accepted: Bearer KEY", code="invalid_api_key"
            )
        length, most = headers.get("content-length", "0"), self._service.settings.max_body_bytes
        if length.isdecimal() and int(length) > most:
            return _too_large(most)
        return None

    def _limited(self, receive: Receive) -> Receive:
        """Return a `receive` that gives up a body that is too large, or that does not come."""
        most, size, is_complete = self._service.settings.max_body_bytes, 0, False

        async def receive_limited() -> Message:
            nonlocal size, is_complete
            if is_complete:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), BODY_SECONDS)
            except asyncio.TimeoutError:
                raise ApiError(408, f"body: nothing has come for {BODY_SECONDS:.0f} seconds") from None
            size += len(message.get("body", b""))
            is_complete = not message.get("more_body", False)
            if size > most:
                raise _too_large(most)
            return message

        return receive_limited

    def _log(self, scope: Scope, caller: Caller, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", None)  # the template, so that metrics have few series
        if route is None:
            self._service.metrics.count_http("unknown", "any", status, seconds)
        else:
            self._service.metrics.count_http(route, scope["method"], status, seconds)
        if self._service.settings.access_log:
            line = {
                "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
                "request_id": caller.request_id,
                "client": (scope.get("client") or ("",))[0],
                "key": caller.key.name,
                "method": scope["method"],
                "path": scope["path"],
                "status": status,
                "seconds": round(seconds, 4),
                **caller.log,
            }
            access_log.info(json.dumps(line))


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"body: is too large; accepted: up to {most} bytes")
