"""The application: which path answers what."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import PlainTextResponse, Response

import longspan
from longspan.server import errors
from longspan.server.dashboard.feed import Feed
from longspan.server.dashboard.page import add_page
from longspan.server.events import EventStream
from longspan.server.guards import KeyGuard, SizeGuard
from longspan.server.protocol import (
    AnyTokenizeRequest,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeChatRequest,
)
from longspan.server.serving import Serving, json_response

_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"description": "The request can't be served as it is; the message says why."},
    401: {"description": "The API key is missing or wrong."},
    404: {"description": "There is no such model, request or path."},
    413: {"description": "The body is too large."},
    429: {"description": "Too many requests wait; Retry-After says when to come again."},
    503: {"description": "The engine has stopped, or is about to."},
}
_EVENTS: dict[int | str, dict[str, Any]] = {200: {"content": {EventStream.media_type: {}}}}


def build_app(serving: Serving) -> FastAPI:
    """The application that serves an engine; it starts and closes it."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        serving.engine.start()
        try:
            yield
        finally:
            await serving.engine.close()
            serving.tokenizing.close()

    app = FastAPI(
        title="Longspan",
        version=longspan.__version__,
        redoc_url=None,
        lifespan=lifespan,
        responses=_ERRORS,
    )
    errors.install(app)
    _add_guards(app, serving)
    _add_generation(app, serving)
    _add_tokens(app, serving)
    _add_state(app, serving)
    _add_dashboard(app, serving)
    return app


def _add_guards(app: FastAPI, serving: Serving) -> None:
    """The one that is added last sees a request first."""
    config = serving.config
    app.add_middleware(SizeGuard, limit=config.max_request_bytes)
    if config.key is not None:
        app.add_middleware(KeyGuard, key=config.key)
    if config.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(config.allowed_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id"],
        )


def _add_generation(app: FastAPI, serving: Serving) -> None:
    @app.post("/v1/completions", responses=_EVENTS)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Complete prompts: texts, or lists of token ids."""
        return await serving.complete(body, request)

    @app.post("/v1/chat/completions", responses=_EVENTS)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer the last message of a conversation, by the model's chat template."""
        return await serving.chat(body, request)

    @app.get("/v1/requests/{request_id}/progress", responses=_EVENTS)
    async def progress(request_id: str) -> Response:
        """Events that tell how far a running request is; its id is its answer's X-Request-Id."""
        if serving.engine.progress(request_id) is None:
            raise HTTPException(404, "there is no such request, or it has ended")
        return EventStream(serving.progress(request_id), lambda: None)


def _add_tokens(app: FastAPI, serving: Serving) -> None:
    @app.post("/tokenize")
    async def tokenize(body: AnyTokenizeRequest) -> Response:
        """The token ids of a text, or of a conversation as the chat template makes it."""
        serving.check_model(body.model)
        tokenizing = serving.tokenizing

        def work() -> dict[str, Any]:
            if isinstance(body, TokenizeChatRequest):
                tokens = tokenizing.conversation(body)
            else:
                special = body.add_special_tokens
                tokens = tokenizing.token_ids(body.prompt, add_special_tokens=special)
            names = tokenizing.tokens(tokens) if body.return_token_strs else None
            limit = serving.engine.engine.context_limit
            return {
                "count": len(tokens),
                "max_model_len": limit,
                "tokens": tokens,
                "token_strs": names,
            }

        return json_response(await tokenizing.run(work))

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> Response:
        """The text of token ids."""
        serving.check_model(body.model)
        text = await serving.tokenizing.run(lambda: serving.tokenizing.text(body.tokens))
        return json_response({"prompt": text})


def _add_state(app: FastAPI, serving: Serving) -> None:
    def model() -> dict[str, Any]:
        return {
            "id": serving.model,
            "object": "model",
            "created": serving.begun,
            "owned_by": "longspan",
            "root": serving.engine.engine.config.model,
            "max_model_len": serving.engine.engine.context_limit,
        }

    @app.get("/v1/models")
    async def models() -> Response:
        """The model that is served."""
        return json_response({"object": "list", "data": [model()]})

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        """The model, if this is its name."""
        serving.check_model(name)
        return json_response(model())

    @app.get("/health")
    async def health() -> Response:
        """Whether requests are served: all ranks are alive, and steps go on while there is work."""
        reason = serving.health()
        if reason is not None:
            return errors.error_response(503, reason)
        return json_response({"status": "ok"})

    @app.get("/version")
    async def version() -> Response:
        """Longspan's version."""
        return json_response({"version": longspan.__version__})

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(serving.metrics.text(), media_type=CONTENT_TYPE_LATEST)


def _add_dashboard(app: FastAPI, serving: Serving) -> None:
    """A page for people; it is no part of the API, so not of its description."""
    add_page(app)

    @app.get("/dashboard/events", include_in_schema=False)
    async def dashboard_events() -> Response:
        """Events that tell what the ranks do, for as long as anybody listens."""
        return EventStream(
            Feed(serving.engine, serving.recent, serving.model).events(), lambda: None
        )
