"""What a request has to pass before it is read: the key, and the limit of its size."""

import hashlib
import hmac

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from longspan.server.dashboard.page import FILES
from longspan.server.errors import error_response

OPEN_PATHS = frozenset({"/health", "/version", "/metrics", "/docs", "/openapi.json", *FILES})
"""What needs no key: nothing in it is anybody's prompt or output."""


class KeyGuard:
    """Answers 401 unless a request brings the key as `Authorization: Bearer KEY`.

    Digests are compared in constant time, so that neither the key nor its length shows in how
    long that takes.
    """

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        self._digest = _digest(f"Bearer {key}".encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(_digest(given), self._digest):
                message = "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'"
                response = error_response(
                    401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"}
                )
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)


class SizeGuard:
    """Answers 413 to a body of more than `limit` bytes, without reading more of it."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        message = f"the request's body is larger than max_request_bytes={self._limit}"
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdecimal() and int(announced) > self._limit:
            response = error_response(413, message, headers={"Connection": "close"})
            await response(scope, receive, send)
            return
        read = 0

        async def counted() -> Message:
            nonlocal read
            part = await receive()
            read += len(part.get("body", b""))
            if read > self._limit:
                raise HTTPException(413, message, {"Connection": "close"})
            return part

        await self._app(scope, counted, send)


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).digest()
