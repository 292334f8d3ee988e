"""What one device says: plain `transformers`, one prompt at a time."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

NEW_TOKENS = 64


def load(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def prompt(length: int, seed: int = 0, vocab_size: int = 512) -> list[int]:
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(vocab_size, (length,), generator=generator).tolist()


def greedy(model: PreTrainedModel, token_ids: list[int], new_tokens: int = NEW_TOKENS) -> list[int]:
    """Exactly `new_tokens` greedy tokens of `model.generate`."""
    with torch.inference_mode():
        output = model.generate(
            torch.tensor([token_ids]),
            attention_mask=torch.ones(1, len(token_ids), dtype=torch.int64),
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return output[0, len(token_ids) :].tolist()


def log_probabilities(model: PreTrainedModel, token_ids: list[int]) -> Tensor:
    """Log-softmax [V] of the logits after the last token."""
    with torch.inference_mode():
        logits = model(torch.tensor([token_ids])).logits[0, -1]
    return logits.float().log_softmax(-1)
