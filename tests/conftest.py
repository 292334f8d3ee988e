"""Settings of the whole test run.

Three layers, the cheapest first: pure Python (scheduler, ledger, tiles); tensors in this process,
with ranks as threads; real worker processes over gloo. A GPU is never needed.
"""

import os
import signal

# Before torch is imported: ranks are many and cores are few.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from hypothesis import settings

torch.set_num_threads(1)
# A run in the background ignores Ctrl-C, and so would the programs that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("longspan", deadline=None, print_blob=True)
settings.load_profile("longspan")
