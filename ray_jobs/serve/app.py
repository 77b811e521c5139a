"""The routes: chat completions, described regions, rendered pictures, samples, health, metrics and the page.

    app = make_app(Service(cfg, loop, view_size=384, model="DAM-3B"))      # an ASGI app; no Ray needed

Bodies are read by pydantic's own JSON parser: bounded depth, no NaN, no more than MAX_ITEMS separators.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.staticfiles import StaticFiles

from meddam_core import __version__
from meddam_core.prompts import list_prompts
from ray_jobs.serve import schema
from ray_jobs.serve.answers import Dialect
from ray_jobs.serve.errors import ApiError, on_failure, on_http_error, on_invalid
from ray_jobs.serve.guards import Guards
from ray_jobs.serve.service import Service

PAGE = Path(__file__).parent / "page"
MAX_ITEMS = 250_000
"""Separators in a body: many small things take more memory and time than their bytes say."""
PACKAGED_NOTE = (
    "The small model that comes with the package knows synthetic pictures only, answers no questions, and errs."
)
"""What the page says where no model was named."""
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": schema.ErrorBody, "description": about}
    for status, about in {
        400: "The request cannot be served as it is.", 401: "No API key, or a wrong one.",
        404: "There is no such model.", 408: "The body came too slowly.", 413: "The body or the picture is too large.",
        415: "The body is not JSON.", 429: "Too many requests, or the day's captions are used up.",
        500: "The engine failed on this request.", 503: "Full, or a replica was lost: try again after Retry-After.",
        504: "The time limit of a request passed.",
    }.items()
}  # fmt: skip


class _BoundedRequest(Request):
    async def json(self) -> Any:
        body = await self.body()
        if body.count(b",") + body.count(b"[") + body.count(b"{") > MAX_ITEMS:
            raise ApiError(413, f"the body holds more than {MAX_ITEMS:,} items", code="body_too_large")
        try:
            return from_json(body, allow_inf_nan=False)
        except ValueError as error:
            told = str(error).split(" at line")[0][:100]
            raise ApiError(400, f"the body is not valid JSON: {told}", code="invalid_json") from None


class _BoundedRoute(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def bounded(request: Request) -> Response:
            kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
            if request.method == "POST" and kind != "application/json":
                raise ApiError(415, "send the body as application/json", code="unsupported_media_type")
            return await handler(_BoundedRequest(request.scope, request.receive))

        return bounded


def make_app(service: Service, *, behind_proxy: bool = False) -> Guards:
    """The ASGI app of one replica, guards included; `behind_proxy` as in Guards."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        watching = asyncio.create_task(service.watch())
        yield
        watching.cancel()

    app = FastAPI(
        title="MedDAM", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None,
        description="Captions for regions of medical images. A research tool: not for diagnosis or treatment.",
    )  # fmt: skip
    app.router.route_class = _BoundedRoute
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(Exception, on_failure)
    _add_api(app, service)
    _add_page(app, service)
    paths = [getattr(route, "path", "") for route in app.routes]
    return Guards(app, service.cfg, service.keys, service.metrics, paths, behind_proxy)


def _add_api(app: FastAPI, service: Service) -> None:
    def chat(dialect: Dialect) -> Callable[..., Coroutine[Any, Any, Response]]:
        async def chat_completions(body: schema.ChatRequest, request: Request) -> Response:
            if not body.stream:
                return JSONResponse(await service.chat(body, request.state.exchange, dialect))
            return StreamingResponse(
                await service.chat_stream(body, request.state.exchange, dialect), media_type="text/event-stream"
            )

        return chat_completions

    ok: dict[int | str, dict[str, Any]] = {
        200: {"model": schema.ChatCompletion, "content": {"text/event-stream": {"schema": {"type": "string"}}}}
    }
    app.post("/v1/chat/completions", responses={**ok, **_ERRORS}, operation_id="chat")(chat("openai"))
    app.post("/chat/completions", responses={**ok, **_ERRORS}, operation_id="chat_dam")(chat("dam"))

    @app.post("/v1/regions:describe", responses={200: {"model": schema.DescribeResponse}, **_ERRORS})
    async def describe_regions(body: schema.DescribeRequest, request: Request) -> Response:
        return JSONResponse(await service.describe(body, request.state.exchange))

    @app.post("/v1/images:render", responses={200: {"model": schema.RenderResponse}, **_ERRORS})
    async def render_image(body: schema.RenderRequest, request: Request) -> Response:
        return JSONResponse(await service.render(body, request.state.exchange))

    keyed: dict[int | str, dict[str, Any]] = {status: _ERRORS[status] for status in (401, 429, 503)}

    @app.get("/v1/models", responses={200: {"model": schema.ModelList}, **keyed})
    async def list_models() -> Response:
        return JSONResponse({"object": "list", "data": [service.card()]})

    @app.get("/v1/models/{model:path}", responses={200: {"model": schema.ModelCard}, 404: _ERRORS[404], **keyed})
    async def get_model(model: str) -> Response:
        service.check_model(model, "openai")
        return JSONResponse(service.card())

    @app.get("/health")
    async def health() -> dict[str, str]:
        service.check_health()
        return {"status": "ok"}

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        service.metrics.read_engine(service.describer.loop)
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> Response:
        return JSONResponse(document(app))


def document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document: FastAPI's, with the errors as they are and the keys."""
    made = app.openapi()
    for operations in made["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            operation["security"] = [{}, {"bearer": []}]
    schemas = made["components"]["schemas"]
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    made["components"]["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
    return made


def _add_page(app: FastAPI, service: Service) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(PAGE / "index.html")

    @app.get("/samples", include_in_schema=False)
    async def list_samples() -> Response:
        prompts = [prompt.id for prompt in list_prompts() if prompt.num_views == 1]
        note = PACKAGED_NOTE if service.cfg.model is None else ""
        facts = {"model": service.model, "note": note, "prompt": service.cfg.prompt, "prompts": prompts}
        return JSONResponse({"samples": service.samples.cards(), "needs_key": service.keys.required, **facts})

    @app.get("/samples/{name}", include_in_schema=False)
    async def get_sample(name: str) -> Response:
        found = await asyncio.to_thread(service.samples.file, name)
        if found is None:
            raise ApiError(404, "there is no such sample", code="not_found")
        return Response(found, media_type="application/octet-stream", headers={"Cache-Control": "max-age=3600"})

    @app.get("/samples/{name}/thumb", include_in_schema=False)
    async def get_thumb(name: str) -> Response:
        found = await asyncio.to_thread(service.samples.thumb, name)
        if found is None:
            raise ApiError(404, "there is no such sample", code="not_found")
        return Response(found, media_type="image/jpeg", headers={"Cache-Control": "max-age=3600"})

    app.mount("/page", StaticFiles(directory=PAGE))
