"""What callers give, brought into one form: prompts, sampling parameters, priorities."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

from longspan.errors import InvalidRequestError
from longspan.sampling_params import SamplingParams
from longspan.tokenizer import encoded, is_plain

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompt = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, {"prompt": text} or {"prompt_token_ids": [...]}."""

_TOKENIZING = {"sanitize_control_tokens", "tokenizer_kwargs", "truncation", "max_length"}
"""Options of a chat template that are about its tokens."""


def prompt_list(prompts: Any) -> list[Prompt]:
    """One prompt or several, as a list of prompts."""
    if isinstance(prompts, str | Mapping) or not isinstance(prompts, Sequence):
        return [prompts]
    one_prompt = bool(prompts) and all(isinstance(item, int) for item in prompts)
    return [prompts] if one_prompt else list(prompts)


def conversations(messages: Any) -> Sequence[Any]:
    """One conversation or several, as a sequence of conversations."""
    if not messages:
        raise InvalidRequestError("messages is empty; it must have at least 1 message")
    return [messages] if isinstance(messages[0], Mapping) else messages


def params_for(
    count: int, params: SamplingParams | Sequence[SamplingParams] | None
) -> list[SamplingParams]:
    """Sampling parameters for each of `count` prompts."""
    if params is None:
        return [SamplingParams()] * count
    if isinstance(params, SamplingParams):
        return [params] * count
    if not isinstance(params, Sequence) or not all(isinstance(p, SamplingParams) for p in params):
        raise InvalidRequestError(
            f"sampling_params={params!r} must be SamplingParams, or a list of them"
        )
    _check_count("sampling_params", len(params), count)
    return list(params)


def priorities_for(count: int, priority: int | Sequence[int]) -> list[int]:
    """A priority for each of `count` prompts."""
    if _is_whole(priority):
        return [priority] * count
    if not isinstance(priority, Sequence) or not all(_is_whole(number) for number in priority):
        raise InvalidRequestError(
            f"priority={priority!r} must be a whole number, or a list of them"
        )
    _check_count("priority", len(priority), count)
    return list(priority)


def tokenized(
    prompt: Prompt, tokenizer: "Callable[[], PreTrainedTokenizerBase]"
) -> tuple[str | None, list[int]]:
    """A prompt's text, where there is one, and its token ids; the tokenizer is got for text."""
    if isinstance(prompt, Mapping):
        if "prompt_token_ids" in prompt:
            return prompt.get("prompt"), _token_ids(prompt["prompt_token_ids"])
        if not isinstance(prompt.get("prompt"), str):
            raise InvalidRequestError(
                f"a prompt needs 'prompt' (text) or 'prompt_token_ids', not {sorted(prompt)}"
            )
        prompt = prompt["prompt"]
    if isinstance(prompt, str):
        return prompt, encoded(tokenizer(), prompt)
    return None, _token_ids(prompt)


def templated(
    tokenizer: "PreTrainedTokenizerBase", conversation: Any, options: Mapping[str, Any]
) -> list[int]:
    """The token ids that the tokenizer's chat template makes of a conversation."""
    # Long texts are encoded here, as `encoded` says, unless the tokenizer has ways of its own.
    tokenize = not is_plain(tokenizer) or not options.keys().isdisjoint(_TOKENIZING)
    try:
        made: Any = tokenizer.apply_chat_template(
            conversation, tokenize=tokenize, return_dict=False, **options
        )
    except Exception as error:  # templates are programs of the model's: they raise what they like
        reason = " ".join(str(error).split())
        raise InvalidRequestError(f"messages don't fit the chat template: {reason}") from error
    return list(made) if tokenize else encoded(tokenizer, made, add_special_tokens=False)


def _token_ids(value: object) -> list[int]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        value = getattr(value, "tolist", lambda: None)()
    if not isinstance(value, Sequence):
        raise InvalidRequestError("prompt_token_ids must be a list of whole numbers")
    for position, token_id in enumerate(value):
        if not _is_whole(token_id):
            raise InvalidRequestError(
                f"prompt_token_ids[{position}]={token_id!r} must be a whole number"
            )
    return list(value)


def _check_count(name: str, given: int, count: int) -> None:
    if given != count:
        raise InvalidRequestError(
            f"{name} has {given} entries for {count} prompts; give one for all or one for each"
        )


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
