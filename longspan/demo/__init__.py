"""A small model that needs no network, for the demonstration of long contexts.

It finds the codes that a long text tells, and little else; `tools/train_needle/` made it.
"""

from pathlib import Path


def model_path() -> Path:
    """Folder of the model and its tokenizer, in Hugging Face's format."""
    return Path(__file__).parent / "model"
