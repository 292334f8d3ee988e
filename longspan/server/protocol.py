"""What clients may ask for: the bodies of requests, with OpenAI's names and vLLM's extras."""

from abc import ABC, abstractmethod
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PlainValidator,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

from longspan.errors import InvalidRequestError
from longspan.sampling_params import SamplingParams
from longspan.server.body import UNSUPPORTED, Body
from longspan.server.config import ServerConfig

_TokenId = Annotated[int, Field(ge=0)]
_PROMPT_TYPES = str | list[str] | list[_TokenId] | list[list[_TokenId]]


def prompt_list(value: Any) -> list[str | list[int]]:
    """One prompt or several, each a text or token ids.

    Looks at a million token ids without making an error for each of them, as a union would.
    """
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        kinds = set(map(type, value))
        if kinds == {int}:
            return [value]
        if kinds == {str}:
            return value
        if kinds == {list} and all(item and set(map(type, item)) == {int} for item in value):
            return value
    raise PydanticCustomError(
        "prompt", "must be a text, a list of token ids, or a list of one of these, not empty"
    )


def _token_ids(value: Any) -> list[int]:
    if isinstance(value, list) and set(map(type, value)) <= {int}:
        return value
    raise PydanticCustomError("token_ids", "must be a list of token ids")


Prompts = Annotated[Any, PlainValidator(prompt_list, json_schema_input_type=_PROMPT_TYPES)]
TokenIds = Annotated[list[int], PlainValidator(_token_ids, json_schema_input_type=list[_TokenId])]
Stops = Annotated[Any, PlainValidator(lambda value: value, json_schema_input_type=str | list[str])]
StopIds = Annotated[Any, PlainValidator(lambda value: value, json_schema_input_type=list[_TokenId])]
"""`SamplingParams` checks these."""


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    include_obfuscation: bool = Field(False, description="Nothing is added to chunks either way.")
    continuous_usage_stats: Literal[False] = False


class Generation(Body, ABC):
    """What a request may say about how tokens are drawn, and how they are sent."""

    default_max_tokens: ClassVar[int | None] = None

    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: Stops = None
    stop_token_ids: StopIds = None
    ignore_eos: bool | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    skip_special_tokens: bool | None = None
    priority: int = Field(0, description="Lower goes first.")
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _check_stream_options(self) -> "Generation":
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("stream_options", "stream_options needs stream=true")
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling_params(self, config: ServerConfig) -> SamplingParams:
        """The engine's parameters.

        Raises:
            InvalidRequestError: a value is outside its limits or the server's.
        """
        names = SamplingParams.__dataclass_fields__.keys() & Generation.model_fields.keys()
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        given |= self._own_params()
        given["max_tokens"] = limited_tokens(
            given["max_tokens"], self.default_max_tokens, config.max_output_tokens
        )
        if given.get("n", 1) > config.max_n:
            raise InvalidRequestError(f"n={given['n']} must be at most {config.max_n}")
        if (given["logprobs"] or 0) > config.max_logprobs:
            raise InvalidRequestError(
                f"logprobs={given['logprobs']} must be at most {config.max_logprobs}"
            )
        return SamplingParams(**given)

    @abstractmethod
    def _own_params(self) -> dict[str, Any]:
        """`max_tokens` and `logprobs`, which kinds of requests say differently."""


class CompletionRequest(Generation):
    """The body of /v1/completions."""

    default_max_tokens: ClassVar[int | None] = 16
    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = UNSUPPORTED | {
        "suffix": ("",),
        "best_of": (1,),
    }

    prompt: Prompts
    echo: bool = Field(False, description="Put the prompt before the completion.")
    logprobs: int | None = Field(None, ge=0)
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _check_echo(self) -> "CompletionRequest":
        if self.echo and self.logprobs is not None:
            raise PydanticCustomError(
                "echo", "echo with logprobs is not supported: there are none of a prompt's tokens"
            )
        return self

    def _own_params(self) -> dict[str, Any]:
        return {"max_tokens": self.max_tokens, "logprobs": self.logprobs}


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """A message; what it has beside role and content goes to the template as it is."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: str
    content: str | list[TextPart] | None = None


class Templated(Body):
    """A conversation, and what its chat template is told."""

    messages: list[ChatMessage] = Field(min_length=1)
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False


class ChatRequest(Generation, Templated):
    """The body of /v1/chat/completions."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = UNSUPPORTED | {
        "add_special_tokens": (False,),
        "audio": (),
        "echo": (False,),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "mm_processor_kwargs": (),
        "modalities": (["text"],),
        "moderation": (),
        "reasoning_effort": (),
        "verbosity": (),
        "web_search_options": (),
    }

    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0)
    tool_choice: Literal["none", "auto"] = Field(
        "auto", description="'none' leaves the tools out of the prompt. Answers are text."
    )

    @model_validator(mode="after")
    def _check_logprobs(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("top_logprobs", "top_logprobs needs logprobs=true")
        return self

    def _own_params(self) -> dict[str, Any]:
        tokens = self.max_completion_tokens
        return {
            "max_tokens": self.max_tokens if tokens is None else tokens,
            "logprobs": (self.top_logprobs or 0) if self.logprobs else None,
        }


class TokenizeRequest(Body):
    """The body of /tokenize for a text."""

    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool = False


class TokenizeChatRequest(Templated):
    """The body of /tokenize for a conversation."""

    return_token_strs: bool = False


def _kind(body: Any) -> str:
    chat = "messages" in body if isinstance(body, dict) else isinstance(body, TokenizeChatRequest)
    return "TokenizeChatRequest" if chat else "TokenizeRequest"


AnyTokenizeRequest = Annotated[
    Annotated[TokenizeRequest, Tag("TokenizeRequest")]
    | Annotated[TokenizeChatRequest, Tag("TokenizeChatRequest")],
    Discriminator(_kind),
]
"""The one of both that a body with or without messages is."""


class DetokenizeRequest(Body):
    """The body of /detokenize."""

    tokens: TokenIds


def limited_tokens(asked: int | None, default: int | None, limit: int | None) -> int | None:
    """`max_tokens` under the server's limit; without one the lower of the others."""
    if asked is None:
        return min((one for one in (default, limit) if one is not None), default=None)
    if limit is not None and asked > limit:
        raise InvalidRequestError(f"max_tokens={asked} must be at most {limit}")
    return asked
