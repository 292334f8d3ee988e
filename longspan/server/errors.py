"""Errors in the shape that OpenAI's clients know."""

from collections.abc import Mapping
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from longspan.engine.async_engine import first_line
from longspan.errors import InvalidRequestError, LongspanError, OverloadedError

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


_NOT_FIELDS = ("body", "TokenizeRequest", "TokenizeChatRequest")
"""Parts of a field's place in a request that its sender knows nothing of."""


class ModelNotFoundError(LongspanError):
    """The model that a request names is not the one that is served."""


def error_body(
    status: int, message: str, *, param: str | None = None, code: str | int | None = None
) -> dict[str, Any]:
    """What an error says, also as an event of a stream that has begun."""
    kind = _TYPES.get(status, "internal_server_error")
    code = status if code is None else code
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | int | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    body = error_body(status, message, param=param, code=code)
    return Response(msgspec.json.encode(body), status, headers, media_type="application/json")


def status_of(error: Exception) -> int:
    """The status that says what one of Longspan's errors says."""
    if isinstance(error, ModelNotFoundError):
        return 404
    if isinstance(error, InvalidRequestError):
        return 400
    if isinstance(error, OverloadedError):
        return 429
    return 503 if isinstance(error, LongspanError) else 500


def refusal(error: Exception) -> Response:
    """The answer that tells of one of Longspan's errors."""
    status, headers = status_of(error), {}
    if isinstance(error, OverloadedError):
        headers["Retry-After"] = str(error.retry_after)
    code = "model_not_found" if isinstance(error, ModelNotFoundError) else None
    return error_response(status, first_line(error), code=code, headers=headers)


def install(app: FastAPI) -> None:
    """Have all errors of an app told in that shape."""

    @app.exception_handler(LongspanError)
    async def _longspan(_: Request, error: LongspanError) -> Response:
        return refusal(error)

    @app.exception_handler(RequestValidationError)
    async def _validation(_: Request, error: RequestValidationError) -> Response:
        field, message = _said(error.errors()[0])
        return error_response(400, message, param=field)

    @app.exception_handler(HTTPException)
    async def _http(_: Request, error: HTTPException) -> Response:
        return error_response(error.status_code, error.detail, headers=error.headers)

    @app.exception_handler(Exception)
    async def _fault(_: Request, error: Exception) -> Response:
        return error_response(500, f"the server failed: {type(error).__name__}")


def _said(error: Mapping[str, Any]) -> tuple[str | None, str]:
    """The field that one of pydantic's errors is about, and what is wrong with it."""
    kind, place = error["type"], [part for part in error["loc"] if part not in _NOT_FIELDS]
    if kind == "json_invalid":
        return None, f"the body is not JSON: {error['ctx']['error']} at character {place[-1]}"
    if not place and kind in ("missing", "model_attributes_type"):
        return (
            None,
            "the body must be a JSON object with the header Content-Type: application/json",
        )
    field = ".".join(map(str, place)) or None
    return field, f"{field}: {error['msg']}" if field else str(error["msg"])
