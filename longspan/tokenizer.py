"""The model's tokenizer, where it has one."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from longspan.config import EngineConfig
from longspan.errors import ConfigError

_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")


def load_tokenizer(config: EngineConfig) -> PreTrainedTokenizerBase | None:
    """The tokenizer of the model, or the one that `config.tokenizer` names; None if it has none.

    Without one, prompts must be token ids and outputs have no text.

    Raises:
        ConfigError: the tokenizer that was asked for by name can't be loaded.
    """
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
