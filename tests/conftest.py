"""Settings of the whole test run.

Three layers, the cheapest first: pure Python (scheduler, ledger, tiles); tensors in this process,
with ranks as threads; real worker processes over gloo. A GPU is never needed, nor used:
`make gpu-check` does that.
"""

import os
import signal

# Before torch is imported: ranks and workers of the tests are many and cores are few.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Before Triton is imported: kernels for GPUs run on the CPU, also where there is a GPU.
os.environ["TRITON_INTERPRET"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
# A run in the background ignores Ctrl-C, and so would the programs that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("longspan", deadline=None, print_blob=True)
settings.load_profile("longspan")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests begin first, so that no worker is left with one when the others are done."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
