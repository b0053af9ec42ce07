"""Error class -> status and OpenAI's error object. One table, one function.

Source of the shapes: OpenAI's API reference, "Error codes"; the codes are strings, as its clients match them.
"""

from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from loraplex import errors

logger = structlog.get_logger(__name__)

TOO_LARGE = "The request body is larger than this server accepts."


class UnsupportedMediaType(errors.InvalidRequest):
    """The body is not of the type that the route reads."""

    code = "unsupported_media_type"


_STATUS: dict[type[errors.LoraplexError], int] = {
    UnsupportedMediaType: 415,
    errors.SourceRefused: 403,
    errors.InvalidRequest: 400,
    errors.ModelNotFound: 404,
    errors.RouteChanged: 412,
    errors.RouteRefused: 409,
    errors.AdapterInvalid: 422,
    errors.PickleRefused: 415,
    errors.AdapterTooLarge: 413,
    errors.AdapterConflict: 409,
    errors.AdapterLoadFailed: 500,
    errors.NotMergeable: 409,
    errors.SourceNotFound: 404,
    errors.SourceFailed: 502,
    errors.InsufficientMemory: 507,
    errors.AdapterError: 422,
    errors.StorageFull: 507,
    errors.Overloaded: 503,
    errors.NotReady: 503,
    errors.RequestFailed: 500,
    errors.LoraplexError: 500,
}
_MAX_DETAILS = 10
_MAX_DETAIL_CHARS = 200


def status_of(error: errors.LoraplexError) -> int:
    return next(_STATUS[kind] for kind in type(error).__mro__ if kind in _STATUS)


def error_body(status: int, message: str, code: str, param: str | None = None) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def body_of(error: errors.LoraplexError) -> dict[str, Any]:
    return error_body(status_of(error), error.message, error.code, error.param)


def install_error_handlers(app: FastAPI) -> None:
    app.add_exception_handler(errors.LoraplexError, _on_loraplex_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_unexpected_error)


async def _on_loraplex_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, errors.LoraplexError)
    status = status_of(error)
    headers = {}
    if status >= 500 and status != 503:  # a disk, a device, a source: whoever runs the server has to know
        logger.warning("request failed", path=request.url.path, status=status, code=error.code, reason=error.message)
    if status == 503:
        headers["Retry-After"] = str(getattr(error, "retry_after", 1))
    if isinstance(error, errors.RequestFailed | errors.AdapterLoadFailed):
        headers["x-should-retry"] = "false"
    return JSONResponse(body_of(error), status, headers)


async def _on_validation_error(request: Request, error: Exception) -> JSONResponse:
    """400 with the first few problems. Nothing of the input is echoed: a body must not be able to make the answer
    many times its own size."""
    assert isinstance(error, RequestValidationError)
    found = error.errors()
    kind, *place = found[0]["loc"]
    if kind == "body" and not is_json(request.headers.get("content-type", "")):
        message = "Send the request as JSON: add -H 'Content-Type: application/json'."
        return JSONResponse(error_body(415, message, "unsupported_media_type"), 415)
    if found[0]["type"] == "json_invalid":
        message = f"The body is not valid JSON: {found[0].get('ctx', {}).get('error', '')} at character {place[0]}."
        return JSONResponse(error_body(400, message, "invalid_json"), 400)
    problems = []
    for problem in found[:_MAX_DETAILS]:
        where = ".".join(str(part)[:64] for part in problem["loc"][1:4]) or "the body"
        problems.append(f"{where}: {problem['msg']}"[:_MAX_DETAIL_CHARS])
    param = str(place[0])[:64] if place else None
    return JSONResponse(error_body(400, "; ".join(problems), "invalid_request", param), 400)


async def _on_http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    if error.status_code == 413:
        message, code = TOO_LARGE, "request_too_large"
    elif error.status_code == 404:
        message, code = f"There is nothing at {request.url.path[:200]}.", "not_found"
    elif error.status_code == 405:
        message, code = f"{request.method} is not a method of {request.url.path[:200]}.", "method_not_allowed"
    else:
        message, code = str(error.detail), "invalid_request"
    return JSONResponse(error_body(error.status_code, message, code), error.status_code, error.headers)


async def _on_unexpected_error(request: Request, error: Exception) -> JSONResponse:
    logger.error("unexpected error", path=request.url.path, exc_info=error)
    message = f"The server failed unexpectedly ({type(error).__name__}); its log says more."
    return JSONResponse(error_body(500, message, "internal_error"), 500)


def is_json(content_type: str) -> bool:
    kind = content_type.partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))
