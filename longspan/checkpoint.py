"""The files of a checkpoint in a folder."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from longspan.errors import ConfigError

__all__ = ["check_weights"]


def check_weights(folder: Path, name: str) -> None:
    """Check that a model's folder has the config and all the weights that it names.

    Raises:
        ConfigError: a file is missing or can't be read.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if not (folder / "config.json").is_file():
        raise ConfigError(f"model={name!r}: the folder has no config.json")
    if not single.is_file() and not index.is_file():
        raise ConfigError(f"model={name!r}: the folder has no safetensors weights")
    try:
        if single.is_file():
            with safe_open(single, framework="numpy"):
                return
        files = set(json.loads(index.read_text())["weight_map"].values())
    except (SafetensorError, ValueError, KeyError) as error:
        raise ConfigError(f"model={name!r}: its weights can't be read: {error}") from error
    for file in sorted(files):
        if not (folder / file).is_file():
            raise ConfigError(f"model={name!r}: the folder has no {file}")
