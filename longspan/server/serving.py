"""From a request's body to its answer: what the endpoints that generate have in common."""

import asyncio
import re
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import chain
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from longspan.engine.async_engine import AsyncEngine, first_line
from longspan.engine.stream import Stream
from longspan.errors import LongspanError
from longspan.outputs import RequestOutput
from longspan.sampling_params import SamplingParams
from longspan.server.answers import Answer, ChatChoices, Choices, TextChoices, Usage
from longspan.server.config import ServerConfig
from longspan.server.dashboard.recent import Recent
from longspan.server.errors import ModelNotFoundError, error_body, status_of
from longspan.server.events import (
    DONE,
    HEARTBEAT,
    EventStream,
    event,
    unless_gone,
)
from longspan.server.metrics import Metrics
from longspan.server.protocol import ChatRequest, CompletionRequest, Generation
from longspan.server.record import Record
from longspan.server.tokenizing import Tokenizing

PROGRESS_SECONDS = 0.25
"""A progress stream tells at such times how far a request is."""

_CLIENT_GONE = 499
_GIVEN_ID = re.compile(r"[A-Za-z0-9_.:-]{1,64}")


class Serving:
    """An engine behind HTTP: what all requests share."""

    def __init__(self, engine: AsyncEngine, config: ServerConfig) -> None:
        model = engine.engine.config.model
        self.engine = engine
        self.config = config
        self.model = config.served_model_name or model
        self.begun = int(time.time())
        self.tokenizing = Tokenizing(engine.engine.tokenizer, model)
        self.metrics = Metrics(engine, self.model)
        self.recent = Recent()

    def check_model(self, name: str | None) -> None:
        """Raises ModelNotFoundError unless it is the name of the model, or none."""
        if name not in (None, self.model):
            raise ModelNotFoundError(
                f"the model {str(name)[:200]!r} does not exist; this server has {self.model!r}"
            )

    def health(self) -> str | None:
        """Why requests would not be served, if so."""
        if self.engine.error is not None:
            return first_line(self.engine.error)
        stalled, limit = self.engine.stalled_seconds, self.config.health_timeout
        if stalled > limit:
            return f"no rank has finished a step for {stalled:.0f} s (health_timeout={limit:g})"
        return None

    async def complete(self, body: CompletionRequest, request: Request) -> Response:
        """Answer a request for completions."""
        arrived = time.monotonic()
        params = self._accept(body, len(body.prompt))
        special = body.add_special_tokens

        def prepare() -> tuple[list[list[int]], list[str] | None]:
            prompts = [
                self.tokenizing.token_ids(prompt, add_special_tokens=special)
                for prompt in body.prompt
            ]
            self._check(prompts, params)
            echoes = [
                prompt if isinstance(prompt, str) else self.tokenizing.text(prompt)
                for prompt in (body.prompt if body.echo else ())
            ]
            return prompts, echoes or None

        prompts, echoes = await self.tokenizing.run(prepare)
        choices = TextChoices(params.n, echoes)
        record = self._record("cmpl", request, prompts, params, arrived)
        return await self._answer(body, request, prompts, params, choices, record)

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        """Answer a request for the next message of a conversation."""
        arrived = time.monotonic()
        params = self._accept(body, 1)

        def prepare() -> list[list[int]]:
            prompts = [self.tokenizing.conversation(body)]
            self._check(prompts, params)
            return prompts

        prompts = await self.tokenizing.run(prepare)
        choices = ChatChoices(body.top_logprobs or 0)
        record = self._record("chatcmpl", request, prompts, params, arrived)
        return await self._answer(body, request, prompts, params, choices, record)

    async def progress(self, request_id: str) -> AsyncGenerator[bytes, None]:
        """Events that tell how far a request is, until it has ended."""
        while (progress := self.engine.progress(request_id)) is not None:
            yield event({"id": request_id, **asdict(progress)})
            await asyncio.sleep(PROGRESS_SECONDS)
        yield event({"id": request_id, "state": "finished"})
        yield DONE

    def _accept(self, body: Generation, num_prompts: int) -> SamplingParams:
        """What a request asks of the engine, before its text is looked at."""
        self.check_model(body.model)
        params = body.sampling_params(self.config)
        self.engine.check_room(num_prompts * params.n)
        return params

    def _check(self, prompts: Sequence[list[int]], params: SamplingParams) -> None:
        for prompt in prompts:
            self.engine.engine.check(prompt, params)

    def _record(
        self,
        kind: str,
        request: Request,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        arrived: float,
    ) -> Record:
        """The record of a request, whose id is of the client's choosing if it says one."""
        given = request.headers.get("x-request-id", "")
        name = f"{kind}-{given}" if _GIVEN_ID.fullmatch(given) else ""
        if not name or self.engine.progress(name) is not None:
            name = f"{kind}-{uuid.uuid4().hex}"
        usage = Usage(sum(map(len, prompts)))
        return Record(name, request.url.path, usage, arrived, params.n * len(prompts))

    async def _answer(
        self,
        body: Generation,
        request: Request,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        choices: Choices,
        record: Record,
    ) -> Response:
        name, usages = record.request_id, body.include_usage
        answer = Answer(choices, name, self.model, params.n, record.usage, usages=usages)
        stream = self.engine.submit(prompts, params, request_id=name, priority=body.priority)
        finish = self._finish_of(stream, record)
        headers = {"X-Request-Id": name}
        if body.stream:
            return EventStream(self._events(stream, answer, record, usages), finish, headers)
        try:
            outputs = await unless_gone(request, _collected(stream, record))
        except LongspanError as error:
            record.error = first_line(error)
            raise
        finally:
            finish()
        if outputs is None:
            return Response(status_code=_CLIENT_GONE)
        return json_response(answer.document(outputs), headers)

    def _finish_of(self, stream: Stream, record: Record) -> partial[None]:
        """What is to be done when nobody waits for a stream any more."""
        limit, loop = self.config.request_timeout, asyncio.get_running_loop()
        deadline = None if limit is None else loop.call_later(limit, stream.abort)
        return partial(self._finish, stream, record, deadline)

    def _finish(self, stream: Stream, record: Record, deadline: asyncio.TimerHandle | None) -> None:
        if deadline is not None:
            deadline.cancel()
        stream.abort()
        record.end()
        self.metrics.count(record)
        self.recent.add(record)

    async def _events(
        self, stream: Stream, answer: Answer, record: Record, usage: bool
    ) -> AsyncGenerator[bytes, None]:
        """An answer as it is drawn. An error after its beginning is an event too."""
        try:
            while not stream.over:
                outputs = await stream.read(self.config.heartbeat_interval)
                for output in outputs:
                    record.count(output)
                chunks = chain.from_iterable(map(answer.chunks, outputs))
                # One message, though a client that reads slowly may have several outputs to come.
                if news := b"".join(map(event, chunks)) if outputs else HEARTBEAT:
                    yield news
            if usage:
                yield event(answer.last_chunk())
        except LongspanError as error:
            record.error = first_line(error)
            yield event(error_body(status_of(error), record.error))
        yield DONE


async def _collected(stream: Stream, record: Record) -> list[RequestOutput]:
    """The whole outputs of a stream, one for each prompt."""
    wholes: dict[int, RequestOutput] = {}
    async for outputs in stream:
        for output in outputs:
            record.count(output)
            if output.prompt_index in wholes:
                wholes[output.prompt_index].add(output)
            else:
                wholes[output.prompt_index] = output
    return list(wholes.values())


def json_response(document: Any, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(document), 200, headers, media_type="application/json")
