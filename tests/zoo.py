"""Tiny random models of real architectures, saved as checkpoints are, and a tokenizer for them.

Weights are wide enough that logits have clear margins and that greedy text hardly repeats itself.
"""

import zlib
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCAB_SIZE = 512
END = "<|end|>"
END_ID = 0

FULL = "full_attention"
# RoPE that follows the longest position in a batch.
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
    "original_max_position_embeddings": 64,
    "factor": 8.0,
}

_CHAT = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 8192,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": END_ID,
    "pad_token_id": None,
}

# What an architecture has beside the common fields, or instead of them.
_OWN: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": None},
    "gemma": {"num_key_value_heads": 1},
    "phi3": {"sliding_window": None},
    "olmo2": {},
    "granite": {"attention_multiplier": 0.3, "residual_multiplier": 0.8, "logits_scaling": 0.5},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
}

NAMES = tuple(_OWN)


def build(name: str, folder: Path, **overrides: Any) -> Path:
    """Save a tiny float32 model of one of transformers' model types, the same every time."""
    config = AutoConfig.for_model(name, **{**_COMMON, **_OWN.get(name, {}), **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(name.encode()))
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    return folder


def build_tokenizer(folder: Path) -> Path:
    """Save a byte-level BPE of `VOCAB_SIZE` tokens, learnt from Python's help.

    It has a chat template, and its end is token `END_ID` as the models' is.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((topics[title] for title in sorted(topics)), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, chat_template=_CHAT)
    fast.save_pretrained(folder)
    return folder
