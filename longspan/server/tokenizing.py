"""Text to token ids and back, in threads, so that long prompts don't hold up the event loop."""

import asyncio
import copy
import inspect
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from longspan.errors import InvalidRequestError
from longspan.prompts import templated
from longspan.server.protocol import ChatRequest, Templated, TokenizeChatRequest
from longspan.tokenizer import encoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

_THREADS = 4


class Tokenizing:
    """A tokenizer for a server's requests, or none if the model has none.

    It is a copy: the engine decodes with its own at the same time. The library lets other threads
    run while it encodes.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase | None", model: str) -> None:
        self._tokenizer = copy.deepcopy(tokenizer)
        self._model = model
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="longspan-tokenizer")

    async def run(self, work: Callable[[], T]) -> T:
        """Do some work of a request that takes its time in one of the threads."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    # What follows is called in the threads.

    def token_ids(self, prompt: str | list[int], *, add_special_tokens: bool = True) -> list[int]:
        if isinstance(prompt, list):
            return prompt
        return encoded(self.known(), prompt, add_special_tokens=add_special_tokens)

    def text(self, token_ids: list[int]) -> str:
        """The text of token ids, special tokens included.

        Raises:
            InvalidRequestError: there is no such token.
        """
        tokenizer = self.known()
        for token_id in token_ids:
            if not 0 <= token_id < len(tokenizer):
                raise InvalidRequestError(
                    f"token {token_id} is outside the vocabulary (0 to {len(tokenizer) - 1})"
                )
        return str(tokenizer.decode(token_ids, skip_special_tokens=False))

    def tokens(self, token_ids: list[int]) -> list[str]:
        """The names that the vocabulary has for token ids."""
        return list(self.known().convert_ids_to_tokens(token_ids))

    def conversation(self, body: ChatRequest | TokenizeChatRequest) -> list[int]:
        """The token ids that the chat template makes of a conversation.

        Raises:
            InvalidRequestError: it can't, there is none, or it may not be told so.
        """
        tokenizer = self.known()
        if tokenizer.chat_template is None:
            raise InvalidRequestError(
                f"the tokenizer of {self._model!r} has no chat template; use /v1/completions"
            )
        messages = [_message(message.model_dump(exclude_unset=True)) for message in body.messages]
        return templated(tokenizer, messages, self._template_options(body))

    def known(self) -> "PreTrainedTokenizerBase":
        if self._tokenizer is None:
            raise InvalidRequestError(
                f"{self._model!r} has no tokenizer: give the prompt as token ids"
            )
        return self._tokenizer

    def _template_options(self, body: Templated) -> dict[str, Any]:
        # Some of these names would replace the template or what is made of it.
        reserved = inspect.signature(self.known().apply_chat_template).parameters
        own = body.chat_template_kwargs or {}
        for name in own:
            if name in reserved:
                raise InvalidRequestError(f"chat_template_kwargs may not have {name!r}")
        prompted, goes_on = body.add_generation_prompt, body.continue_final_message
        if goes_on and "add_generation_prompt" not in body.model_fields_set:
            prompted = False
        options = {"add_generation_prompt": prompted, "continue_final_message": goes_on, **own}
        without = isinstance(body, ChatRequest) and body.tool_choice == "none"
        if body.tools and not without:
            options["tools"] = body.tools
        return options


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as templates want it: text in one piece, and arguments of tool calls as objects."""
    made = dict(message)
    if isinstance(made.get("content"), list):
        made["content"] = "\n".join(part["text"] for part in made["content"])
    if isinstance(made.get("tool_calls"), list):
        made["tool_calls"] = [_tool_call(call) for call in made["tool_calls"]]
    return made


def _tool_call(call: Any) -> Any:
    try:
        function = call["function"]
        arguments = json.loads(function["arguments"])
    except (KeyError, TypeError, ValueError):
        return call  # it is the template's to take or to refuse
    return {**call, "function": {**function, "arguments": arguments}}
