"""Short digests that tell whether two hosts have the same model."""

import hashlib
import json
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from longspan.config import EngineConfig

__all__ = ["config_digest", "model_digest"]

_NUM_SAMPLES = 64
"""How many numbers of each weight are looked at: another training changes nearly all of them."""


def config_digest(config: EngineConfig) -> str:
    """The digest of a model's config.json; the model must exist."""
    raw, _ = PreTrainedConfig.get_config_dict(config.model, revision=config.revision)
    return _of_json(raw)


def model_digest(model: PreTrainedModel) -> str:
    """The digest of a loaded model's config and of a sample of every weight."""
    found = hashlib.sha256(_of_json(model.config.to_dict()).encode())
    for name, weight in model.named_parameters():
        numbers = weight.detach().flatten()
        sample = numbers[:: max(len(numbers) // _NUM_SAMPLES, 1)]
        found.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        found.update(sample.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _of_json(config: dict[str, Any]) -> str:
    # Names with an underscore say where the config was found.
    told = {name: value for name, value in config.items() if not name.startswith("_")}
    text = json.dumps(told, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
