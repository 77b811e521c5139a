"""Errors as OpenAI's clients expect them: {"error": {"message", "type", "param", "code"}} with a status that fits."""

from __future__ import annotations

from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from meddam_core.records import Reason, RowError

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_REASONS = {Reason.TOO_LARGE: 413, Reason.OUT_OF_MEMORY: 503}
_SHOWN_FAULTS = 3
"""Faults of a request's form that are named; a list of a million wrong numbers has a million."""


class ApiError(HTTPException):
    """What a client did wrong, or why it must come back later. `message` holds nothing of images, prompts or keys."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:  # fmt: skip
        headers = None if retry_after_s is None else {"Retry-After": str(max(1, round(retry_after_s)))}
        super().__init__(status, message, headers)
        self.code = code
        self.param = param

    def body(self) -> dict[str, Any]:
        """The JSON to send."""
        return error_body(self.status_code, self.detail, self.code, self.param)

    def response(self) -> JSONResponse:
        """The answer to send."""
        return JSONResponse(self.body(), self.status_code, self.headers)


def error_body(status: int, message: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """The JSON of an error."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def of_row(error: RowError, param: str | None = None) -> ApiError:
    """An image or region that cannot be described, as an error of the request."""
    status = _REASONS.get(error.reason, 400)
    retry = 5.0 if status == 503 else None
    return ApiError(status, error.detail, code=error.reason.value, param=param, retry_after_s=retry)


async def on_http_error(request: Request, error: Exception) -> JSONResponse:
    """Exception handler of the app for everything that has a status."""
    assert isinstance(error, HTTPException)
    if isinstance(error, ApiError):
        return error.response()
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    return JSONResponse(
        error_body(error.status_code, str(error.detail), code), error.status_code, headers=error.headers
    )


async def on_failure(request: Request, error: Exception) -> JSONResponse:
    """Exception handler of the app for what nobody foresaw; the guards log where it came from."""
    return ApiError(500, "the server failed on this request", code="internal_error").response()


async def on_invalid(request: Request, error: Exception) -> JSONResponse:
    """Exception handler of the app for bodies of another form than the schema's: which field, and what is wrong."""
    assert isinstance(error, RequestValidationError)
    faults = error.errors()
    told = [f"{_place(f['loc'])}: {f['msg']}" for f in faults[:_SHOWN_FAULTS]]
    more = f" (and {len(faults) - _SHOWN_FAULTS} more)" if len(faults) > _SHOWN_FAULTS else ""
    first = _place(faults[0]["loc"]) if faults else None
    return ApiError(400, "; ".join(told)[:1000] + more, code="invalid_value", param=first).response()


def _place(loc: tuple[int | str, ...]) -> str:
    return ".".join(str(part)[:60] for part in loc if part != "body") or "body"
