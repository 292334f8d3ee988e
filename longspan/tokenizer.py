"""The model's tokenizer, where it has one. Transformers is imported when one is loaded."""

from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

from longspan.config import EngineConfig
from longspan.errors import ConfigError, InvalidRequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")


def load_tokenizer(config: EngineConfig) -> "PreTrainedTokenizerBase | None":
    """The tokenizer of the model, or the one that `config.tokenizer` names; None if it has none.

    Without one, prompts must be token ids and outputs have no text.

    Raises:
        ConfigError: the tokenizer that was asked for by name can't be loaded.
    """
    from transformers import AutoTokenizer

    name = config.tokenizer or config.model
    folder = Path(name)
    if not config.tokenizer and folder.is_dir() and not any((folder / f).is_file() for f in _FILES):
        return None
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            name, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"tokenizer={name!r} can't be loaded: {str(error).splitlines()[0]}"
        ) from error
    return tokenizer


def encoded(
    tokenizer: "PreTrainedTokenizerBase", text: str, *, add_special_tokens: bool = True
) -> list[int]:
    """The token ids of a text, as `tokenizer.encode` has them.

    Where that only passes the text on to the tokenizers library, it is asked directly, without
    the place of each token in the text, which takes most of the time of a long one.

    Raises:
        InvalidRequestError: the text has surrogates, which are no characters.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"the text is not Unicode: {error.reason} at character {error.start}"
        ) from None
    if not is_plain(tokenizer):
        return list(tokenizer.encode(text, add_special_tokens=add_special_tokens, verbose=False))
    [encoding] = tokenizer.backend_tokenizer.encode_batch_fast(
        [text], add_special_tokens=add_special_tokens
    )
    token_ids: list[int] = encoding.ids
    return token_ids


def is_plain(tokenizer: "PreTrainedTokenizerBase") -> "TypeGuard[PreTrainedTokenizerFast]":
    """Whether it only passes text on to the tokenizers library, whole and as it is."""
    from transformers import PreTrainedTokenizerFast

    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return False
    backend = tokenizer.backend_tokenizer
    return (
        all(
            getattr(getattr(tokenizer, name), "__func__", None)
            is getattr(PreTrainedTokenizerFast, name)
            for name in ("encode", "_encode_plus", "apply_chat_template")
        )
        and backend.truncation is None
        and backend.padding is None
        and backend.encode_special_tokens == tokenizer.split_special_tokens
    )
