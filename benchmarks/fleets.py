"""Fleets for benchmarks: ranks on this host, or over hosts that are joined by shaped links."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from transformers.utils import logging

from longspan.config import EngineConfig
from longspan.models import load_spec
from longspan.parallel.transport import Transport
from longspan.worker.model_runner import ModelRunner

sys.path.append(str(Path(__file__).parents[1] / "tests" / "hosts"))

from netns import Hosts, unavailable
from ranks import Ranks

__all__ = ["PAGE_SIZE", "Ranks", "fleet", "runner", "unavailable"]

PAGE_SIZE = 16


@contextmanager
def fleet(sizes: Sequence[int], gbit: float | None) -> Iterator[Ranks]:
    """`sizes[h]` ranks on host h, whose link carries so many Gbit/s; None is for one host."""
    if gbit is None:
        with Ranks(sizes) as ranks:
            yield ranks
    else:
        with Hosts(len(sizes), gbit) as hosts, Ranks(sizes, hosts) as ranks:
            yield ranks


@cache
def runner(transport: Transport, folder: str, tokens: int) -> ModelRunner:
    """This rank's model, from a folder, and a pool for so many tokens, filled alike on all ranks.

    For work that runs on ranks: they keep it from one call to the next.
    """
    logging.disable_progress_bar()
    config = EngineConfig(model=folder, device="cpu", page_size=PAGE_SIZE, kv_cache_tokens=tokens)
    made = ModelRunner(config, load_spec(config), transport, torch.device("cpu"))
    made.pool.data.normal_(generator=torch.Generator().manual_seed(0))
    return made
