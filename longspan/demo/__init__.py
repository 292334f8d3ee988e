"""A small model and a long text that need no network, for the demonstration of long contexts.

The text is Python's own reference, read at run time from the interpreter's standard library. The
model is a four-layer Llama trained on that text by `tools/train_demo/train.py`; it shows that long
contexts are served exactly, and nothing about quality.
"""

from pathlib import Path
from pydoc_data.topics import topics


def model_path() -> Path:
    """Folder of the model and its tokenizer, in Hugging Face's format."""
    return Path(__file__).parent / "model"


def text() -> str:
    """Every topic of Python's built-in help, each under its title, as one long document."""
    return "\n\n".join(f"# {title}\n\n{topics[title].strip()}" for title in sorted(topics)) + "\n"
