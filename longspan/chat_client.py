"""A client of a server's chat: answers as they come, and how far their prompts are."""

from collections.abc import Iterator, Sequence
from http.client import HTTPException, HTTPResponse
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import msgspec

from longspan.errors import ServerError


class Answer:
    """The pieces of an answer's text; iterate over it once. `usage` is there at its end.

    Raises, while it is iterated over:
        ServerError: the server has ended it with an error, or has gone.
    """

    def __init__(self, response: HTTPResponse) -> None:
        self.request_id: str | None = response.headers["X-Request-Id"]
        self.usage: dict[str, Any] = {}
        self._response = response

    def __iter__(self) -> Iterator[str]:
        for chunk in _events(self._response):
            self.usage = chunk.get("usage") or self.usage
            for choice in chunk["choices"]:
                if text := choice["delta"].get("content"):
                    yield text

    def close(self) -> None:
        """Want no more of it; the server ends the request."""
        self._response.close()


class ChatClient:
    """Talks to one server by OpenAI's API, and by Longspan's own for the progress of prompts."""

    def __init__(self, url: str, key: str | None) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        self._key = key

    def model(self) -> str:
        """The name of the first model that is served."""
        with self._open("/v1/models") as response:
            return str(msgspec.json.decode(response.read())["data"][0]["id"])

    def answer(self, model: str, messages: Sequence[dict[str, str]], **settings: Any) -> Answer:
        """Ask for the next message. `settings` go into the request, but for those that are None."""
        given = {name: value for name, value in settings.items() if value is not None}
        streamed = {"stream": True, "stream_options": {"include_usage": True}}
        body = {"model": model, "messages": messages, **streamed, **given}
        return Answer(self._open("/v1/chat/completions", body))

    def progress(self, request_id: str) -> Iterator[dict[str, Any]]:
        """How far a request is, until it has ended; nothing where the server does not tell."""
        try:
            with self._open(f"/v1/requests/{request_id}/progress") as response:
                yield from _events(response)
        except ServerError:
            return

    def _open(self, path: str, body: dict[str, Any] | None = None) -> HTTPResponse:
        headers = {"Content-Type": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        data = None if body is None else msgspec.json.encode(body)
        try:
            response = urlopen(Request(self._url + path, data, headers))
        except HTTPError as error:
            with error:
                raise ServerError(_reason(error)) from None
        except (URLError, OSError, HTTPException, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise ServerError(
                f"no server at {self._url}: {reason}; start one with 'longspan serve', "
                "or give its address as --url"
            ) from None
        assert isinstance(response, HTTPResponse)
        return response


def _events(response: HTTPResponse) -> Iterator[dict[str, Any]]:
    """The documents of an event stream; comments are passed over."""
    try:
        for line in response:
            if not line.startswith(b"data: "):
                continue
            data = line.removeprefix(b"data: ").strip()
            if data == b"[DONE]":
                return
            document = msgspec.json.decode(data)
            if "error" in document:
                raise ServerError(document["error"]["message"])
            yield document
    except (OSError, HTTPException) as error:
        raise ServerError(f"the server has gone: {error}") from None


def _reason(error: HTTPError) -> str:
    """What the server says of a request that it refuses."""
    try:
        return str(msgspec.json.decode(error.read())["error"]["message"])
    except (msgspec.DecodeError, KeyError, TypeError):
        return f"{error.url} answers {error.code} {error.reason}"
