"""Longspan: exact serving of long contexts over several devices."""

from typing import TYPE_CHECKING, Any

from longspan.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from longspan.sampling_params import SamplingParams

if TYPE_CHECKING:
    from longspan.llm import LLM

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "CompletionOutput",
    "Logprob",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
]


def __getattr__(name: str) -> Any:
    # Loaded at first use: `longspan.ops` and a worker do without the engine and transformers.
    if name == "LLM":
        from longspan.llm import LLM

        return LLM
    raise AttributeError(f"module 'longspan' has no attribute {name!r}")
